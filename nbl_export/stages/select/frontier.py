"""The frontier of a workload: what attention alone, MLPs alone, both, and dropped blocks lose for what they gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbl_export.blocks import all_parts
from nbl_export.linearize.budget import CurvePoint, largest_within
from nbl_export.linearize.figures import Candidate
from nbl_export.linearize.selection import Line
from nbl_export.settings import Budget
from nbl_export.stages.select.choosing import DROPPED, Choosing, Way


@dataclass(frozen=True)
class Measured:
    """A way with the points of its curve."""

    way: Way
    points: Sequence[CurvePoint]

    def within(self, budget: Budget) -> float:
        """How many times as fast the workload is with as much of it as the ``budget`` of loss allows."""
        k = largest_within(self.points, budget)
        return max((p.workload_speedup or 1.0 for p in self.points if p.k == k), default=1.0)


@dataclass(frozen=True)
class Frontier:
    """The way that ships, and the others that were measured."""

    chosen: Measured
    others: tuple[Measured, ...] = ()

    @property
    def lines(self) -> tuple[Line, ...]:
        """The others, as a report has them."""
        return tuple(Line(one.way.name, tuple(one.points)) for one in self.others)

    def fastest(self, choosing: Choosing, budget: Budget) -> Frontier:
        """With the linear way chosen that is fastest within a ``budget`` of loss: the one that was, where as fast.

        Each is filled with whatever block there still is room for.
        """
        blocks, every = self.chosen.way.blocks, (self.chosen, *self.others)
        linear = [one for one in every if one.way.name != DROPPED]
        filled = [Measured(*choosing.filled(one.way, one.points, budget, blocks)) for one in linear]
        chosen = max(filled, key=lambda one: one.within(budget))
        return Frontier(chosen, tuple(one for one in every if one.way.name != chosen.way.name))


def measured(
    choosing: Choosing, candidates: Sequence[Candidate], chosen: Measured, budget: Budget
) -> Frontier:
    """What else the scored ``candidates`` allow, each as far as the ``budget`` or, without one, the chosen way lost."""
    if not chosen.points:
        return Frontier(chosen)
    if not budget.bounds_loss:
        budget = Budget(max_kl=max(point.kl for point in chosen.points))
    return Frontier(
        chosen,
        tuple(
            Measured(way, choosing.curve(way, len(all_parts(way.blocks)), budget))
            for way in choosing.others(candidates)
        ),
    )
