"""Run a model from one of its blocks on: what comes before is not computed again.

Measuring many replacements on one text runs the same first blocks over and over. The states at each block's
input are kept, and a run begins at the first block that is new:

    tokens ─► embedding ─► passed over … ─► states put in ─► block i ─► … ─► logits

The embedding, the masks and the rotary tables are computed as always; they cost little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import attention_layer, hidden_states, plain_attributes

if TYPE_CHECKING:
    from nbl_export.models.layers import AttentionLayer


class _Passed(torch.nn.Module):
    """Stands where a block stood and returns its input as that returned its output."""

    def __init__(self, block: torch.nn.Module, returns: int | None) -> None:
        super().__init__()
        # Models ask their blocks for plain_attributes, as what their tokens see.
        vars(self).update(plain_attributes(block))
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = hidden_states(args, kwargs)
        return h if self.returns is None else (h, *[None] * (self.returns - 1))


@contextmanager
def recording_inputs(
    model: torch.nn.Module, layers: Sequence[AttentionLayer]
) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, every forward pass fills the dictionary with each layer's block input [batch, seq, d]."""
    kept: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def keep(_block: Any, args: Any, kwargs: Any, index: int = layer.index) -> None:
                kept[index] = hidden_states(args, kwargs)

            block = model.get_submodule(layer.block)
            hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield kept


@contextmanager
def starting_at(model: torch.nn.Module, index: int, states: torch.Tensor) -> Iterator[None]:
    """Within the block, ``model`` begins at attention layer ``index`` with ``states`` [batch, seq, d] as its input."""
    layer = attention_layer(model, index)
    returns = dummy_run(model).block_returns
    stack: Any = model.get_submodule(layer.block.rpartition(".")[0])
    before = [stack[i] for i in range(index)]

    def put_in(_block: Any, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": states}
        return (states, *args[1:]), kwargs

    hook = stack[index].register_forward_pre_hook(put_in, with_kwargs=True, prepend=True)
    try:
        for i, block in enumerate(before):
            stack[i] = _Passed(block, returns[i])
        yield
    finally:
        for i, block in enumerate(before):
            stack[i] = block
        hook.remove()


class Reached(Exception):
    """Raised by a hook to end a run of :func:`run_between` where it is."""


def run_between(
    model: torch.nn.Module,
    ids: torch.Tensor,
    start: tuple[int, torch.Tensor] | None = None,
    end: int | None = None,
) -> torch.Tensor | None:
    """Run ``model`` over ``ids`` [batch, seq] and return the input [batch, seq, d] of attention layer ``end``.

    ``start`` is an attention layer and its input there, to begin at. With ``end`` None the run goes on to the last
    block, and None is returned.
    """
    dummy_run(model)  # before any hook is set that would see it
    found: list[torch.Tensor] = []

    def stop(_block: Any, args: Any, kwargs: Any) -> None:
        found.append(hidden_states(args, kwargs))
        raise Reached

    with ExitStack() as stack:
        if start is not None:
            stack.enter_context(starting_at(model, *start))
        if end is not None:
            block = model.get_submodule(attention_layer(model, end).block)
            stack.callback(block.register_forward_pre_hook(stop, with_kwargs=True).remove)
        with suppress(Reached):
            backbone(model)(input_ids=ids, use_cache=False)
    return found[0] if found else None


def backbone(model: torch.nn.Module) -> Any:
    """The blocks without the language-model head: its logits, a fifth of a small model's work, are often not needed."""
    return getattr(model, "base_model", model)
