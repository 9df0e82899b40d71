"""Greedy search as tests ask for it: the first K blocks, in the order in which they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nbl_export.blocks import Block
from nbl_export.linearize.search import MeasuredSets, Prefixes, greedy_path
from nbl_export.linearize.selection import Loss


def greedy_order(
    sets: MeasuredSets,
    singles: Mapping[Block, Loss],
    count: int,
    saved: Callable[[Sequence[Block], Block], float] = lambda _linear, _block: 1.0,
) -> list[Block]:
    """``saved`` is what a block saves where others are linear already."""

    def together(blocks: Sequence[Block]) -> float:
        return sum(saved(blocks[:number], block) for number, block in enumerate(blocks))

    return list(Prefixes(greedy_path(sets, singles, together))(count))
