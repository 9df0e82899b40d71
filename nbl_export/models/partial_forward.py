"""Run a model from one of its blocks on, without computing the blocks before it.

Measuring many replacements on one text would run the same first blocks many times. Instead the states at each block's
input are recorded, and a run starts at the first block that differs:

    tokens ─► embedding ─► skipped blocks … ─► recorded states ─► block i ─► … ─► logits

The embedding, the masks and the rotary tables are computed as usual; their cost is small.

A model that is larger than memory is trained through block by block, too: :func:`recomputed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import block_stack, hidden_states, plain_attributes


class _SkippedBlock(torch.nn.Module):
    """Replaces a block and returns its input in the form of the block's output."""

    def __init__(self, block: torch.nn.Module, returns: int | None) -> None:
        super().__init__()
        # Models read attributes of their blocks, such as the kind of attention.
        vars(self).update(plain_attributes(block))
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = hidden_states(args, kwargs)
        return h if self.returns is None else (h, *[None] * (self.returns - 1))


@contextmanager
def recording_inputs(model: torch.nn.Module, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, every forward pass records the input [batch, seq, d] of these ``layers``, by number."""
    recorded: dict[int, torch.Tensor] = {}
    stack: Any = block_stack(model)[1]
    with ExitStack() as hooks:
        for number in layers:

            def record(_block: Any, args: Any, kwargs: Any, index: int = number) -> None:
                recorded[index] = hidden_states(args, kwargs)

            block = stack[number]
            hooks.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield recorded


@contextmanager
def starting_at(model: torch.nn.Module, index: int, states: torch.Tensor) -> Iterator[None]:
    """Within the block, ``model`` starts at layer ``index`` with ``states`` [batch, seq, d] as its input."""
    dummy_run(model)  # before any hook is registered, since its own run would trigger them
    stack: Any = block_stack(model)[1]
    block = stack[index]

    def put_in(_block: Any, args: Any, kwargs: Any) -> Any:
        return with_states(states, args, kwargs)

    hook = block.register_forward_pre_hook(put_in, with_kwargs=True, prepend=True)
    try:
        with skipped(model, index):
            yield
    finally:
        hook.remove()


def beginning(model: torch.nn.Module, index: int) -> int:
    """The layer at which a run must be started so that layer ``index`` and all after it have what they read.

    It is an earlier one where they attend to its keys and values.
    """
    shared = dummy_run(model).shared
    earlier = [lender for borrower, lender in shared.items() if lender < index <= borrower]
    return beginning(model, min(earlier)) if earlier else index


@contextmanager
def skipped(model: torch.nn.Module, count: int) -> Iterator[None]:
    """Within the block, the first ``count`` blocks of ``model`` return their input."""
    with _without(model, range(count)):
        yield


@contextmanager
def one_of_each_kind(model: torch.nn.Module) -> Iterator[int]:
    """Within the block, ``model`` has the first block of each kind, and the others return their input.

    The value is the number of those that are left. Blocks of a kind have the same modules of the same sizes with the
    same settings, but for their own number, as ``layer_idx``. Where blocks take more from each other than the states,
    all are left.
    """
    stack: Any = block_stack(model)[1]
    settings = [_settings(block) for block in stack]
    keys = {key for own in settings for key in own}
    numbers = {key for key in keys if all(own.get(key, i) == i for i, own in enumerate(settings))}
    types = getattr(model.config.get_text_config(), "layer_types", None) or []  # type: ignore[operator, union-attr]
    first: dict[Any, int] = {}
    for index, (block, own) in enumerate(zip(stack, settings, strict=True)):
        kind = [(key, repr(value)) for key, value in sorted(own.items()) if key not in numbers]
        sizes = [(name, weight.shape) for name, weight in block.named_parameters()]
        modules = [(name, type(module)) for name, module in block.named_modules()]
        declared = types[index] if index < len(types) else None
        first.setdefault((declared, tuple(kind), tuple(sizes), tuple(modules)), index)
    facts = dummy_run(model)
    left = set(first.values()) if facts.separate else set(range(len(stack)))
    left |= {facts.shared[i] for i in left if i in facts.shared}
    with _without(model, [index for index in range(len(stack)) if index not in left]):
        yield len(left)


def _settings(block: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """The plain values of a block's modules, by the module's name and theirs."""
    simple = bool | int | float | str | tuple | None  # type: ignore[type-arg]
    return {
        (name, key): value
        for name, module in block.named_modules()
        for key, value in plain_attributes(module).items()
        if isinstance(value, simple)
    }


@contextmanager
def _without(model: torch.nn.Module, indices: Iterable[int]) -> Iterator[None]:
    returns = dummy_run(model).block_returns
    stack: Any = block_stack(model)[1]
    before = {i: stack[i] for i in indices}
    try:
        for i, block in before.items():
            stack[i] = _SkippedBlock(block, returns[i])
        yield
    finally:
        for i, block in before.items():
            stack[i] = block


class _Recomputed(torch.nn.Module):
    """Stands for a block, and keeps only its input for the backward pass, in which the block is computed again."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        vars(self).update(plain_attributes(block))
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def recomputed(model: torch.nn.Module, first: int) -> Iterator[None]:
    """Within the block, a backward pass through ``model`` has one block's activations and weights at a time.

    Each block from ``first`` on is computed again when the backward pass comes to it: the same bits. Blocks that take
    more from each other than the states are not.
    """
    facts = dummy_run(model)
    if facts.shared or not facts.separate:
        yield
        return
    stack: Any = block_stack(model)[1]
    blocks = list(stack)
    try:
        for index in range(first, len(blocks)):
            stack[index] = _Recomputed(blocks[index])
        yield
    finally:
        for index in range(first, len(blocks)):
            stack[index] = blocks[index]


def with_states(states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of the ``forward`` of a block with other hidden states."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": states}
    return (states, *args[1:]), kwargs


class Reached(Exception):
    """Raised by a hook to stop a run."""
