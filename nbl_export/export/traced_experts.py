"""Trace the experts of a mixture as one operator, and what one expert computes by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from nbl_export.export.recurrence import SYMBOLIC_DOMAIN
from nbl_export.models.running import quiet

EXPERTS = "Experts"


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over the experts that each token [tokens, d] is routed to: ``top_k_*`` are [tokens, k]."""
    weights = list(_weights(module).values())
    if torch.compiler.is_exporting():
        found: torch.Tensor = torch.onnx.ops.symbolic(
            f"{SYMBOLIC_DOMAIN}::{EXPERTS}",
            [hidden_states, top_k_index, top_k_weights, *weights],
            {"module": _NUMBERS[id(module)]},
            dtype=hidden_states.dtype,
            shape=hidden_states.shape,
        )
        return found
    result, expert = torch.zeros_like(hidden_states), _Expert(module)
    for number in range(module.num_experts):
        token, place = torch.nonzero(top_k_index == number, as_tuple=True)
        own = [turned(w, module)[number : number + 1] for w in weights]
        y = expert(hidden_states[None, token], own)[0] * top_k_weights[token, place, None]
        result.index_add_(0, token, y.to(result.dtype))
    return result


# Of the model that is being traced: the number of each module with experts, by which the graph knows it.
_NUMBERS: dict[int, int] = {}


@contextmanager
def numbered(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, :func:`experts` of ``model`` can be traced."""
    _NUMBERS.update((id(module), number) for number, module in enumerate(model.modules()))
    try:
        yield
    finally:
        _NUMBERS.clear()


def _weights(module: Any) -> dict[str, torch.Tensor]:
    """The parameters of the experts ``module``, those that multiply first, all by experts or the same for all."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    found = {name: getattr(module, name) for name in names}
    if module.has_bias:
        found |= {f"{name}_bias": getattr(module, f"{name}_bias") for name in names}
    if module.has_post_expert_norm:
        found |= {f"post_expert_norm.{n}": p for n, p in module.post_expert_norm.named_parameters()}
    return found


def turned(weight: Any, module: Any) -> Any:
    """``weight``, a tensor or an array, as an expert reads it.

    Matrices are [experts, inputs, outputs], biases [experts, 1, outputs].
    """
    if weight.ndim == 3:
        return weight if module.is_transposed else weight.swapaxes(1, 2)
    return weight[:, None] if weight.ndim == 2 else weight


class _Expert(torch.nn.Module):
    """What one expert computes of [experts, tokens, d], with its weights as inputs."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.of = [module]  # whose parameters are not this one's

    def forward(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        module, (up, down, *others) = self.of[0], weights
        biases = others[:2] if module.has_bias else (None, None)
        inner = _plus(x @ up, biases[0])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = _plus(inner @ down, biases[1])
        if module.has_post_expert_norm:
            own = dict(zip(dict(module.post_expert_norm.named_parameters()), others[-1:], strict=True))
            y = torch.func.functional_call(module.post_expert_norm, own, (y,))
        return y


def _plus(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias


def body_of(module: Any, opset: int) -> ir.Graph:
    """What an expert of ``module`` computes: inputs x [n, tokens, d] or [1, tokens, d] and n experts' weights."""
    shapes = [turned(weight, module).shape for weight in _weights(module).values()]
    # Sizes of 0 or 1 would become constants.
    weights = [
        torch.empty(2, *shape[1:], device="meta") if len(shape) > 1 else torch.empty(shape)
        for shape in shapes
    ]
    x, free = torch.empty(2, 3, shapes[0][1], device="meta"), torch.export.Dim.DYNAMIC
    named = [{0: free} if weight.ndim > 1 else None for weight in weights]
    with quiet(), torch.no_grad():
        program = torch.export.export(
            _Expert(module), (x, weights), dynamic_shapes=({0: free, 1: free}, named), strict=False
        )
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert exported is not None
    return exported.model.graph
