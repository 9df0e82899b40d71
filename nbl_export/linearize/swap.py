"""The PyTorch reference: the original model with the planned attention modules swapped for W and b."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nbl_export.errors import InputError
from nbl_export.linearize.lmmse import FitInput
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.layers import attention_layers, hidden_size, hidden_states

if TYPE_CHECKING:
    from nbl_export.models.layers import AttentionLayer


class LinearAttentionReplacement(torch.nn.Module):
    """Stands where an attention module stood: returns (W u + b, None) and touches no cache.

    With ``fit_input`` ``"residual"``, u is the block's input, which a pre-hook on the block hands over.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layer: LinearLayer, fit_input: FitInput, like: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(layer.w).to(like))
        self.register_buffer("bias", torch.from_numpy(layer.b).to(like))
        self.fit_input = fit_input
        self.residual: torch.Tensor | None = None

    def take_residual(self, _block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = hidden_states(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        u = hidden_states(args, kwargs) if self.fit_input == "normed" else self.residual
        assert u is not None
        return torch.nn.functional.linear(u, self.weight, self.bias), None


@contextmanager
def linearized(model: torch.nn.Module, plan: Plan) -> Iterator[torch.nn.Module]:
    """``model`` with ``plan`` applied, for the length of the block; the original modules come back after.

    Raises :class:`InputError` if the plan is of a model of another depth or width.
    """
    layers = attention_layers(model)
    if plan.layer_count != len(layers) or plan.hidden_size != hidden_size(model):
        raise InputError(
            f"The plan is for {plan.layer_count} layers of width {plan.hidden_size}; this model has "
            f"{len(layers)} of width {hidden_size(model)}: run `nbl-export select` for this model."
        )
    undo: list[Any] = []
    try:
        for index in plan.chosen:
            undo.append(_swap(model, layers[index], plan))
        yield model
    finally:
        for restore in reversed(undo):
            restore()


def _swap(model: torch.nn.Module, layer: AttentionLayer, plan: Plan) -> Any:
    parent = model.get_submodule(layer.block)
    name = layer.attention.removeprefix(layer.block + ".")
    original = parent.get_submodule(name)
    like = next(original.parameters())
    replacement = LinearAttentionReplacement(plan.layers[layer.index], plan.fit_input, like)
    # A block may ask its attention for more than its output: Gemma 3 of transformers 4 reads `is_sliding`.
    facts = {k: v for k, v in vars(original).items() if not k.startswith("_") and not callable(v)}
    vars(replacement).update(facts | vars(replacement))
    hook = parent.register_forward_pre_hook(replacement.take_residual, with_kwargs=True)
    setattr(parent, name, replacement)

    def restore() -> None:
        hook.remove()
        setattr(parent, name, original)

    return restore
