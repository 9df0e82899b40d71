"""Run rows through a model one block at a time: the unit of work of a model that may be larger than memory.

The weights of a block are read once, every batch goes through it, and what is kept between blocks are the states: the
input of the next block, [batch, sequence, d] for each batch.

    batches ─► embedding ─► block 0 ─► states ─► block 1 ─► states ─► …

The model's own code runs: earlier blocks are skipped, and the run ends at the input of the next block. So masks, rotary
tables and whatever the model does between blocks are its own, and each batch is computed as in one forward pass, to the
bit. Blocks that take more from each other than the states are run together, as those from the first whose keys and
values others attend to up to the last of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import accepted_arguments, backbone, block_stack, hidden_states
from nbl_export.models.partial_forward import Reached, skipped, with_states
from nbl_export.models.weights import held, outside_blocks
from nbl_export.progress import Listener, Silent

# The arguments of a forward pass by name; without a cache unless it brings one.
Batch = Mapping[str, Any]
# One batch and its states, None before the first block, to the states after.
Step = Callable[[Batch, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """The blocks from ``start`` up to ``stop``, which are run together; nearly always one."""

    start: int
    stop: int


def segments(model: torch.nn.Module) -> list[Segment]:
    """The parts of ``model`` in which rows go through it."""
    count, facts = len(list(block_stack(model)[1].children())), dummy_run(model)
    if not facts.separate:
        return [Segment(0, count)]
    # From the first layer whose keys and values are read to the last that reads some, what they share stays.
    first, last = min(facts.shared.values(), default=0), max(facts.shared, default=0)
    together = [Segment(first, last + 1)] if facts.shared else []
    apart = (i for i in range(count) if not together or not first <= i <= last)
    return sorted([*together, *(Segment(i, i + 1) for i in apart)], key=lambda part: part.start)


@contextmanager
def walking(model: torch.nn.Module) -> Iterator[Callable[[Segment], Any]]:
    """Within the block, ``model`` keeps what lies beside its blocks; the value makes the context of a segment.

    The context's value runs a batch through the segment; the segment's weights are in memory while it is open.
    """
    dummy_run(model)  # before any hook is registered, since its own run would trigger them
    with outside_blocks(model):
        yield lambda segment: _segment(model, segment)


@contextmanager
def _segment(model: torch.nn.Module, segment: Segment) -> Iterator[Step]:
    path, stack = block_stack(model)
    blocks: Any = stack
    run: Any = backbone(model)
    given: list[torch.Tensor] = []
    found: list[torch.Tensor] = []

    def put_in(_block: Any, args: Any, kwargs: Any) -> Any:
        return with_states(given[0], args, kwargs)

    def stop(_block: Any, args: Any, kwargs: Any) -> None:
        found.append(hidden_states(args, kwargs))
        raise Reached

    def end(_block: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise Reached

    with ExitStack() as within:
        names = [f"{path}.{index}" for index in range(segment.start, segment.stop)]
        within.enter_context(held(model, names))
        if segment.start:
            within.enter_context(skipped(model, segment.start))
            hook = blocks[segment.start].register_forward_pre_hook(put_in, with_kwargs=True, prepend=True)
            within.callback(hook.remove)
        # First of all hooks, so that the weights of the next block are not read.
        if segment.stop < len(blocks):
            hook = blocks[segment.stop].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        else:
            hook = blocks[segment.stop - 1].register_forward_hook(end)
        within.callback(hook.remove)

        def step(batch: Batch, states: torch.Tensor | None) -> torch.Tensor:
            given[:], found[:] = [] if states is None else [states], []
            with suppress(Reached):
                run(**{**accepted_arguments(run, use_cache=False), **batch})
            return found.pop()

        yield step


@contextmanager
def passing(
    model: torch.nn.Module, run: Callable[[Segment], Any], part: Segment, stop: int
) -> Iterator[Step]:
    """The step of ``part`` whose rows go on up to block ``stop``, which is at least where the part ends."""
    if stop == part.stop:
        with run(part) as step:
            yield step
        return
    after: list[torch.Tensor] = []

    def keep(_block: Any, _args: Any, output: Any) -> None:
        after.append(output[0] if isinstance(output, tuple) else output)

    def passed(batch: Batch, states: torch.Tensor | None) -> torch.Tensor:
        step(batch, states)
        return after.pop()

    blocks: Any = block_stack(model)[1]
    hook = blocks[part.stop - 1].register_forward_hook(keep)
    try:
        with run(Segment(part.start, stop)) as step:
            yield passed
    finally:
        hook.remove()


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
        with passing_blocks(model, listener) as parts:
            for part in parts:
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
def passing_blocks(model: torch.nn.Module, listener: Listener | None = None) -> Iterator[Iterator[Segment]]:
    """The :func:`segments` of ``model``; each that has been passed is reported to the ``listener``."""
    parts = segments(model)
    with (listener or Silent()).task("Running the blocks", parts[-1].stop, "blocks") as task:

        def passed() -> Iterator[Segment]:
            for part in parts:
                yield part
                task.advance(part.stop - part.start)

        yield passed()


@contextmanager
def after_blocks(model: torch.nn.Module) -> Iterator[Callable[[Batch, torch.Tensor], Any]]:
    """Within the block, the value makes the output of ``model`` of a batch and its states after the last block."""
    dummy_run(model)
    blocks: Any = block_stack(model)[1]
    given: list[torch.Tensor] = []

    def put_out(_block: Any, _args: Any, output: Any) -> Any:
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    def finish(batch: Batch, states: torch.Tensor) -> Any:
        given[:] = [states]
        return model(**{**accepted_arguments(model, use_cache=False), **batch})

    with outside_blocks(model, head=True), skipped(model, len(blocks)):
        hook = blocks[len(blocks) - 1].register_forward_hook(put_out)
        try:
            yield finish
        finally:
            hook.remove()
