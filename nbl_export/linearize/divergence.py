"""The loss of a repair: the mean divergence of the next token's predictions, and its gradient."""

from __future__ import annotations

from typing import Any

import torch

from nbl_export.linearize.loss import chunks


def divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean KL(p ‖ q) of ``target`` and ``logits`` [places, vocab]; its gradient is (q - p) / places.

    Worked out in parts: the same by autograd keeps several float32 copies of both. The gradient is written over the
    ``target``.
    """
    mean: torch.Tensor = _Divergence.apply(logits, target)  # type: ignore[no-untyped-call]
    return mean


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        for part in chunks(len(logits)):
            log_p, log_q = (torch.log_softmax(t[part].float(), dim=-1) for t in (target, logits))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            target[part] = ((log_q.exp_() - p) / len(logits)).to(target)
        ctx.save_for_backward(target)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient)), None
