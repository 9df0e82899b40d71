"""A short distillation of W and b alone: the linearized model learns the original's predictions.

The loss is KL(original ‖ linearized) of the next token, on calibration text; everything but the maps is frozen. A
map is trained in the coordinates in which its input is white and its output of unit size,

    W = W₀ + s V L⁻¹        b = b₀ + s c - (W - W₀) μ        C_uu = L Lᵀ,   s² = E‖y - μ_y‖² / d

so that one learning rate suits every direction of every layer: the inputs' variances differ by orders of magnitude.
V and c begin at nil and are merged at the end, so that a repaired map is a map like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbl_export.linearize.lmmse import Covariances, FitInput
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import AttentionReplacement, replaced
from nbl_export.models.layers import attention_layers
from nbl_export.models.resume import beginning_at, inputs_kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens of a step; rows of text are taken until there are as many.
_STEP_TOKENS = 1024
_RATE = 2e-3
_WARM_UP = 10
_LAST_RATE = 0.05  # of the rate, at the end of the cosine
_RIDGE = 1e-3  # of the whitening: a direction with hardly any variance is not blown up


@dataclass
class _Trained:
    """One map: fixed W₀, b₀ and coordinates, trained V [d, d] and c [d], all float32."""

    w: torch.Tensor
    b: torch.Tensor
    mean: torch.Tensor
    unwhitened: torch.Tensor
    scale: float
    v: torch.Tensor
    c: torch.Tensor

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        change = self.scale * (self.v @ self.unwhitened)
        return self.w + change, self.b + self.scale * self.c - change @ self.mean

    def layer(self) -> LinearLayer:
        with torch.no_grad():
            w, b = self.merged()
        return LinearLayer(w.cpu().numpy(), b.cpu().numpy())


def repair(
    model: torch.nn.Module,
    maps: Mapping[int, LinearLayer],
    covariances: Mapping[int, Covariances],
    fit_input: FitInput,
    tokens: NDArray[np.int32],
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda _steps: None,
) -> dict[int, LinearLayer]:
    """``maps`` after ``steps`` of Adam over ``tokens`` [rows, seq], shuffled by ``seed``.

    ``covariances`` are those of each map's input and output on the original model.
    """
    first = min(maps)
    layer = next(layer for layer in attention_layers(model) if layer.index == first)
    device = next(model.parameters()).device
    trained = {i: _begin(maps[i], covariances[i], device) for i in sorted(maps)}
    parameters = [t for one in trained.values() for t in (one.v, one.c)]
    optimizer = torch.optim.Adam(parameters, lr=_RATE, betas=(0.9, 0.98), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rows = max(1, _STEP_TOKENS // tokens.shape[1])
    order = np.random.default_rng(seed).permutation(len(tokens))
    for step in range(steps):
        wanted = order[np.arange(step * rows, (step + 1) * rows) % len(order)]
        ids = torch.from_numpy(tokens[wanted].astype(np.int64)).to(device)
        with torch.no_grad(), inputs_kept(model, [layer]) as kept:
            target = model(input_ids=ids, use_cache=False).logits
        with ExitStack() as stack:
            modules = stack.enter_context(replaced(model, maps, fit_input))
            stack.enter_context(beginning_at(model, first, kept[first]))
            for index, one in trained.items():
                _put(modules[index], one)
            logits = model(input_ids=ids, use_cache=False).logits
            loss: torch.Tensor = _Divergence.apply(logits.flatten(0, -2), target.flatten(0, -2))  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance(1)
    return {index: one.layer() for index, one in trained.items()}


def _begin(layer: LinearLayer, c: Covariances, device: torch.device) -> _Trained:
    d = len(layer.b)
    ridge = _RIDGE * np.diagonal(c.c_uu)
    low = np.linalg.cholesky(c.c_uu + np.diag(np.where(ridge > 0, ridge, 1.0)))
    scale = math.sqrt(max(float(np.trace(c.c_vv)) / d, float(np.finfo(np.float32).tiny)))

    def tensor(value: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(value), dtype=torch.float32, device=device)

    return _Trained(
        tensor(layer.w),
        tensor(layer.b),
        tensor(c.mean_u),
        tensor(np.linalg.inv(low)),
        scale,
        torch.zeros(d, d, device=device, requires_grad=True),
        torch.zeros(d, device=device, requires_grad=True),
    )


def _put(module: AttentionReplacement, one: _Trained) -> None:
    w, b = one.merged()
    module.weight, module.bias = w.to(module.weight), b.to(module.bias)


def _rate(step: int, steps: int) -> float:
    cosine = 0.5 * (
        1 + math.cos(math.pi * step / max(steps, 1))
    )  # it is asked once even if nothing is to be done
    return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


_PLACES = 64


class _Divergence(torch.autograd.Function):
    """Mean KL(p ‖ q) of ``target`` and ``logits`` [places, vocab]; its gradient is (q - p) / places.

    Written out in parts: the same by autograd keeps several float32 copies of both.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for at in range(0, len(logits), _PLACES):
            part = slice(at, at + _PLACES)
            log_p, log_q = (torch.log_softmax(t[part].float(), dim=-1) for t in (target, logits))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[part] = ((log_q.exp_() - p) / len(logits)).to(gradient)
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient), None
