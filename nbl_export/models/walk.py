"""Run rows through a model one block at a time, or from one of its blocks on: for a model that is larger than memory.

The weights of a block are read once, every batch goes through it, and what is kept between blocks are the states: the
input of the next block, [batch, sequence, d] for each batch.

    batches ─► embedding ─► block 0 ─► states ─► block 1 ─► states ─► …

The model's own code runs: earlier blocks are skipped, and the run ends at the input of the next block. So masks, rotary
tables and whatever the model does between blocks are its own, and each batch is computed as in one forward pass, to the
bit. Blocks that take more from each other than the states are run together, as those from the first whose keys and
values others attend to up to the last of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import backbone, block_stack, layer_count
from nbl_export.models.running import Hooks, accepted_arguments, hidden_states, plain_attributes, states_in
from nbl_export.models.weights import held, outside_blocks
from nbl_export.progress import Listener, Silent

# The arguments of a forward pass by name; without a cache unless it brings one.
Batch = Mapping[str, Any]
# One batch and its states, None before the first block, to the states after.
Step = Callable[[Batch, torch.Tensor | None], torch.Tensor]


class Reached(Exception):
    """Raised by a hook to stop a run."""


# The blocks that are run together; nearly always one.
Segment = range


def segments(model: torch.nn.Module) -> list[Segment]:
    """The parts of ``model`` in which rows go through it."""
    count, facts = layer_count(model), dummy_run(model)
    if not facts.separate:
        return [Segment(0, count)]
    # From the first layer whose keys and values are read to the last that reads some, what they share stays.
    first, last = min(facts.shared.values(), default=0), max(facts.shared, default=0)
    together = [Segment(first, last + 1)] if facts.shared else []
    apart = (i for i in range(count) if not together or not first <= i <= last)
    return sorted([*together, *(Segment(i, i + 1) for i in apart)], key=lambda part: part.start)


def passing_blocks(model: torch.nn.Module, listener: Listener | None = None) -> Iterator[Segment]:
    """The :func:`segments` of ``model``; each that has been passed is reported to the ``listener``."""
    parts = segments(model)
    with (listener or Silent()).task("Running the blocks", parts[-1].stop, "blocks") as task:
        for part in parts:
            yield part
            task.advance(len(part))


@contextmanager
def walking(model: torch.nn.Module) -> Iterator[Callable[..., AbstractContextManager[Step]]]:
    """Within the block, ``model`` keeps what lies beside its blocks; the value makes the context of a segment.

    The context's value runs a batch through the segment; the segment's weights are in memory while it is open. With a
    ``stop`` rows go on up to that block; the states are those after the segment all the same.
    """
    dummy_run(model)  # before any hook is registered, since its own run would trigger them
    with outside_blocks(model):
        yield lambda segment, stop=None: _segment(model, segment, stop or segment.stop)


@contextmanager
def _segment(model: torch.nn.Module, segment: Segment, stop: int) -> Iterator[Step]:
    path, stack = block_stack(model)
    run: Any = backbone(model)
    found: list[torch.Tensor] = []

    def stopped(args: Any, kwargs: Any) -> None:
        found.append(hidden_states(args, kwargs))
        raise Reached

    def end(output: Any) -> None:
        found.append(states_in(output))
        raise Reached

    with Hooks(model) as hooks:
        hooks.enter_context(held(model, [f"{path}.{index}" for index in range(segment.start, stop)]))
        given = hooks.enter_context(starting_at(model, segment.start)) if segment.start else []
        # First of all hooks, so that the weights of the next block are not read.
        if stop < len(list(stack.children())):
            hooks.before(f"{path}.{stop}", stopped, first=True)
        else:
            hooks.after(f"{path}.{stop - 1}", end)
        if stop != segment.stop:
            hooks.after(f"{path}.{segment.stop - 1}", lambda output: found.append(states_in(output)))

        def step(batch: Batch, states: torch.Tensor | None) -> torch.Tensor:
            given[:], found[:] = [] if states is None else [states], []
            with suppress(Reached):
                run(**{**accepted_arguments(run, use_cache=False), **batch})
            return found[0]

        yield step


def through(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    within: Callable[[Segment], AbstractContextManager[Any]] = lambda _segment: nullcontext(),
    each: Callable[[int], AbstractContextManager[Any]] = lambda _number: nullcontext(),
    listener: Listener | None = None,
) -> Iterator[Any]:
    """The output of ``model`` for each of ``batches``; all of them go through a block before the next one is read.

    ``within`` makes the context of a segment, ``each`` that of a batch by its number.
    """
    states: list[Any] = [None] * len(batches)
    with torch.inference_mode(), walking(model) as run:
        for part in passing_blocks(model, listener):
            with run(part) as step, within(part):
                for number, batch in enumerate(batches):
                    with each(number):
                        states[number] = step(batch, states[number])
        with after_blocks(model) as finish:
            for number, batch in enumerate(batches):
                with each(number):
                    output = finish(batch, states[number])
                yield output


@contextmanager
def after_blocks(model: torch.nn.Module) -> Iterator[Callable[[Batch, torch.Tensor], Any]]:
    """Within the block, the value makes the output of ``model`` of a batch and its states after the last block."""
    path, count, given = block_stack(model)[0], layer_count(model), list[torch.Tensor]()

    def put_out(output: Any) -> Any:
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    def finish(batch: Batch, states: torch.Tensor) -> Any:
        given[:] = [states]
        return model(**{**accepted_arguments(model, use_cache=False), **batch})

    with outside_blocks(model, head=True), _without(model, range(count)), Hooks(model) as hooks:
        hooks.after(f"{path}.{count - 1}", put_out)
        yield finish


# from one block on --------------------------------------------------------------------------------


@contextmanager
def recording_inputs(model: torch.nn.Module, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, every forward pass records the input [batch, seq, d] of these ``layers``, by number."""
    recorded: dict[int, torch.Tensor] = {}

    def record(args: Any, kwargs: Any, index: int) -> None:
        recorded[index] = hidden_states(args, kwargs)

    with Hooks(model) as hooks:
        for number in layers:
            hooks.before(f"{block_stack(model)[0]}.{number}", partial(record, index=number))
        yield recorded


@contextmanager
def starting_at(
    model: torch.nn.Module, index: int, states: torch.Tensor | None = None
) -> Iterator[list[torch.Tensor]]:
    """Within the block, ``model`` starts at layer ``index`` with ``states`` [batch, seq, d] as its input.

    The value holds them, for other states in each pass.
    """
    given = [] if states is None else [states]

    def put_in(args: Any, kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": given[0]}
        return (given[0], *args[1:]), kwargs

    with _without(model, range(index)), Hooks(model) as hooks:
        hooks.before(f"{block_stack(model)[0]}.{index}", put_in, first=True)
        yield given


def first_needed(model: torch.nn.Module, index: int) -> int:
    """The layer at which a run must be started so that layer ``index`` and all after it have what they read.

    It is an earlier one where they attend to its keys and values.
    """
    shared = dummy_run(model).shared
    earlier = [lender for borrower, lender in shared.items() if lender < index <= borrower]
    return first_needed(model, min(earlier)) if earlier else index


@contextmanager
def one_of_each_kind(model: torch.nn.Module) -> Iterator[int]:
    """Within the block, ``model`` has the first block of each kind, and the others return their input.

    The value is the number of those that are left. Blocks of a kind have the same modules of the same sizes with the
    same settings, but for their own number, as ``layer_idx``. Where blocks take more from each other than the states,
    all are left.
    """
    stack: Any = block_stack(model)[1]
    simple = bool | int | float | str | tuple | None  # type: ignore[type-arg]
    settings = [
        {
            (name, key): value
            for name, module in block.named_modules()
            for key, value in plain_attributes(module).items()
            if isinstance(value, simple)
        }
        for block in stack
    ]
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


@contextmanager
def recomputed(model: torch.nn.Module, first: int) -> Iterator[None]:
    """Within the block, a backward pass through ``model`` has one block's activations and weights at a time.

    Each block from ``first`` on is computed again when the backward pass comes to it: the same bits. Blocks that take
    more from each other than the states are not.
    """
    facts = dummy_run(model)
    last = first if facts.shared or not facts.separate else layer_count(model)
    # What stands for a block keeps only its input for the backward pass.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with _replaced_blocks(model, range(first, last), lambda _index, block: partial(again, block)):
        yield


@contextmanager
def _without(model: torch.nn.Module, indices: Iterable[int]) -> Iterator[None]:
    """Within the block, these blocks return their input."""
    returns = dummy_run(model).block_returns
    with _replaced_blocks(model, indices, lambda index, _block: partial(_returned, returns[index])):
        yield


@contextmanager
def _replaced_blocks(
    model: torch.nn.Module,
    indices: Iterable[int],
    instead: Callable[[int, torch.nn.Module], Callable[..., Any]],
) -> Iterator[None]:
    stack: Any = block_stack(model)[1]
    before = {index: stack[index] for index in indices}
    try:
        for index, block in before.items():
            stack[index] = _Instead(instead(index, block))
            # Models read attributes of their blocks, such as the kind of attention.
            vars(stack[index]).update(plain_attributes(block))
        yield
    finally:
        for index, block in before.items():
            stack[index] = block


class _Instead(torch.nn.Module):
    """Stands for a block."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward


def _returned(returns: int | None, *args: Any, **kwargs: Any) -> Any:
    """The input of a block in the form of its output."""
    h = hidden_states(args, kwargs)
    return h if returns is None else (h, *[None] * (returns - 1))
