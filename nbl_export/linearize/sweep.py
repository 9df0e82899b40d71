"""Several versions of a model over the same rows, by one pass through its blocks.

The versions differ in what is linear. Each block is read once; in it, all rows of all versions are computed, with the
attention that the version has there:

    block i ─► rows of the settled model ─► rows of version 1 ─► rows of version 2 ─► … ─► block i + 1

Until a version differs from the settled model, its states are those of the settled one. Each row gets the bits of a
forward pass of its whole version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from nbl_export.blocks import Block, layer_of
from nbl_export.linearize.adapters import Adapter, adapted
from nbl_export.linearize.plan import Plan, Replacement
from nbl_export.linearize.swap import check_plan, replaced
from nbl_export.models.layers import block_stack
from nbl_export.models.walk import Segment, after_blocks, passing_blocks, walking
from nbl_export.progress import Listener
from nbl_export.settings.choices import FitInput


@dataclass(frozen=True)
class Version:
    """A model that differs from the settled one from the block ``first`` on.

    ``layers`` are all that are linear in it, also before ``first``; ``adapters`` change weights of its blocks, by
    parameter name. A ``change`` is another one, made when the version begins: it must be of the only version that is
    run. Where the states of each row after the last block are known, they are its ``ends``, and no block is run.
    """

    first: int
    layers: Mapping[Block, Replacement] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    change: AbstractContextManager[Any] = field(default_factory=nullcontext)
    ends: Sequence[torch.Tensor] = ()


ORIGINAL = Version(0)


def version_of(model: torch.nn.Module, plan: Plan) -> Version:
    """``model`` with ``plan`` applied; raises :class:`InputError` for a plan of another depth or width."""
    check_plan(model, plan)
    return Version(layer_of(min(plan.chosen, default=0)), plan.replacements, plan.adapters)


def sweep(
    model: torch.nn.Module,
    rows: Sequence[torch.Tensor],
    versions: Sequence[Version],
    fit_input: FitInput,
    settled: Mapping[Block, Replacement] | None = None,
    advance: Callable[[int], None] = lambda _tokens: None,
    listener: Listener | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Row, version and logits [seq, vocab] for each of ``rows`` [seq] int64 and of ``versions``, row after row.

    ``settled`` are the linear layers of the settled model. ``advance`` is called with the tokens of each row,
    and the ``listener`` is told of each block.
    """
    batches = [{"input_ids": row[None]} for row in rows]
    ours = Version(0, settled or {})
    states: list[Any] = [None] * len(batches)
    own: list[list[Any]] = [list(version.ends) for version in versions]
    with torch.inference_mode(), ExitStack() as changes, walking(model) as run:
        with passing_blocks(model, listener) as parts:
            for part in parts:
                with run(part) as step:
                    for version, there in zip(versions, own, strict=True):
                        if version.ends:
                            continue
                        if not there and version.first < part.stop:
                            there += states
                            changes.enter_context(version.change)
                        if there:
                            with within(model, version, part, fit_input):
                                there[:] = map(step, batches, there)
                    if not all(own):
                        with within(model, ours, part, fit_input):
                            states = list(map(step, batches, states))
        with after_blocks(model) as finish:
            for number, batch in enumerate(batches):
                for which, there in enumerate(own):
                    yield number, which, finish(batch, there[number]).logits[0]
                advance(len(rows[number]))


@contextmanager
def within(model: torch.nn.Module, version: Version, part: Segment, fit_input: FitInput) -> Iterator[None]:
    """Within the block, the blocks of ``part`` are those of the ``version``."""
    inside = range(part.start, part.stop)
    layers = {i: layer for i, layer in version.layers.items() if layer_of(i) in inside}
    prefixes = tuple(f"{block_stack(model)[0]}.{index}." for index in inside)
    adapters = {name: one for name, one in version.adapters.items() if name.startswith(prefixes)}
    with replaced(model, layers, fit_input) if layers else nullcontext(), adapted(model, adapters):
        yield
