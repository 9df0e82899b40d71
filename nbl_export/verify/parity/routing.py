"""Parity of a mixture of experts: PyTorch sends each token to the experts that the graph has sent it to.

Where rounding decides between two nearly equal scores, the graph may choose another expert than PyTorch, and every
figure of that token, and of those that attend to it, then is about two different computations. So the choices are
taken from the graph, and PyTorch is run with them; what the figures say is left to the gates as they are. The choices
have a gate of their own: PyTorch's scores of what the graph chose may fall short of those that it would choose itself
by no more than PyTorch's own run in that precision moves a score of that router.

Nothing of this is done where the graph has no routers, or chooses as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nbl_export.batch.arrays import BOOL, I64
from nbl_export.batch.rows import by_token, differing, left_padded, moved, prefix_mask, shortfall
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import follow_links, load_graph, scratch
from nbl_export.models.attention import Routers
from nbl_export.rewrite.routers import places_of, routers
from nbl_export.runtime.ort import Watch
from nbl_export.verify.parity.compare import Recorded, Rows
from nbl_export.verify.parity.figures import Routing

# What each router of each pass has chosen.
Choices = list[list[I64 | None]]
# How much further than the measured rounding moves a score a choice may fall short, and the same of float32, of the
# size of the scores.
_ROOM, _FLOAT32 = 1.5, 1e-3


def passes(rows: Rows, steps: int, cached: bool, alone: Rows = (), left: bool = True) -> list[BOOL]:
    """Which positions [batch, sequence] of each pass are no padding, as :func:`.decoder.record` runs the rows."""
    found: list[BOOL] = []
    for batch in (rows, *([row] for row in alone)):
        for step in range(steps + 1):
            lengths = np.array([len(row) - steps + step for row in batch])
            if step and cached:
                found.append(np.ones((len(batch), 1), dtype=bool))
            elif left:
                found.append(left_padded([np.zeros(n, np.int32) for n in lengths])[1].astype(bool))
            else:
                found.append(prefix_mask(lengths, int(lengths.max())))
    return found


@contextmanager
def choices_as_outputs(path: Path) -> Iterator[tuple[Path, Watch | None]]:
    """The graph at ``path`` with the choices of its routers as outputs, which a stream is to watch.

    A graph without routers is itself, and nothing is watched.
    """
    model = load_graph(path)
    if not (found := routers(model)):
        yield path, None
        return
    model.graph.outputs.extend(node.outputs[1] for node in found)
    with scratch(model, follow_links(model) or path.parent) as changed:
        yield changed, Watch(tuple(places_of(node) for node in found))


def choices_of(path: Path, watch: Watch, rows: Rows, steps: int, cached: bool, alone: Rows = ()) -> Choices:
    """What the graph at ``path``, whose passes were watched, has chosen for the tokens that are no padding."""
    interface = interface_of(load_graph(path))
    real = passes(rows, steps, cached, alone, left=not interface.in_place)
    return [
        [by_token(array, of_pass) for array in arrays]
        for arrays, of_pass in zip(watch.passes, real, strict=True)
    ]


class Reference:
    """PyTorch on the rows of parity, by its own choices of experts or by those of a graph.

    ``record`` runs it with routers; ``real`` are the passes' positions that are no padding, None for a model that is
    compared as it is.
    """

    def __init__(self, record: Callable[[Routers | None], Recorded], real: Sequence[BOOL] | None) -> None:
        self.record = record
        self.own = None if real is None else Routers(real)
        self.recorded = record(self.own)

    def like(self, told: Choices | None) -> tuple[Recorded, Routers | None]:
        """What PyTorch gives with the choices that it is ``told``, and its routers; by its own, and None, if it has
        other routers.
        """
        if self.own is None or told is None:
            return self.recorded, None
        ours = [[None if a is None else a.own.shape for a in one] for one in self.own.passes]
        if ours != [[None if a is None else a.shape for a in one] for one in told]:
            return self.recorded, None
        routers = Routers(self.own.real, told)
        if not any(differing(own, taken) for own, taken in _pairs(self.own, told)):
            routers.passes = self.own.passes
            return self.recorded, routers
        return self.record(routers), routers


def _pairs(own: Routers, told: Sequence[Sequence[I64 | None]]) -> Iterator[tuple[I64, I64]]:
    for theirs, ours in zip(own.passes, told, strict=True):
        for choice, taken in zip(theirs, ours, strict=True):
            if choice is not None and taken is not None:
                yield choice.own, taken


def moved_by_rounding(told: Routers, half: Routers | None) -> list[float]:
    """How far half precision moves a score of each router, the choices being the same."""
    if half is None:
        return []
    return [
        max(moved(a.scores, b.scores) for a, b in zip(exact, rounded, strict=True) if a and b)
        for exact, rounded in zip(zip(*told.passes, strict=True), zip(*half.passes, strict=True), strict=True)
    ]


def routing_of(own: Routers, told: Routers, by_rounding: Sequence[float]) -> Routing:
    """A graph's choices, which PyTorch was ``told``, beside its ``own``.

    A choice is judged by the scores that PyTorch computes having been told all choices before it. ``by_rounding`` is
    how far rounding moves a score of each router; nothing for float32.
    """
    assert told.told is not None
    pairs = list(_pairs(own, told.told))
    worst = 0.0
    for number in range(len(told.passes[0])):
        short, size = 0.0, 0.0
        for choices, taken in zip(told.passes, told.told, strict=True):
            choice, places = choices[number], taken[number]
            if choice is None or places is None:
                continue
            short = max(short, float(shortfall(choice.scores, places).max(initial=0.0)))
            known = choice.scores[np.isfinite(choice.scores)]
            size = max(size, float(np.sqrt(np.mean(known**2))) if known.size else 0.0)
        allowed = max(_ROOM * by_rounding[number] if by_rounding else 0.0, _FLOAT32 * size)
        worst = max(worst, short / allowed if allowed else 0.0)
    return Routing(sum(len(a) for a, _ in pairs), sum(differing(*pair) for pair in pairs), worst)


def routing_failures(found: Routing) -> list[str]:
    """A sentence if a choice of the graph is none that rounding explains."""
    if found.worst <= 1:
        return []
    return [
        f"the graph sends a token to experts whose scores fall short by {found.worst:.3g} times what rounding explains"
    ]
