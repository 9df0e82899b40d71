"""Choose the layers: rank them, measure what K of them cost, and take as many as asked for or as a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from nbl_export.blocks import Block, all_parts
from nbl_export.errors import BudgetError, InputError
from nbl_export.linearize.budget import CurvePoint, keeps, largest_within
from nbl_export.linearize.figures import Candidate, Loss
from nbl_export.linearize.scores import check_k
from nbl_export.linearize.selection import Curve
from nbl_export.progress import Listener
from nbl_export.settings import Budget, SelectSettings
from nbl_export.stages.select.choosing import Choosing, Prefix
from nbl_export.stages.select.frontier import Frontier, Measured, measured
from nbl_export.stages.select.speeds import points_of

if TYPE_CHECKING:
    from nbl_export.stages.select.speeds import SpeedMeter

T = TypeVar("T")


@dataclass(frozen=True)
class Shipped(Generic[T]):
    """What was ``made`` of the chosen layers, and its ``loss``: None where it is that of the K curve."""

    made: T
    loss: Loss | None


def choose(
    choosing: Choosing,
    candidates: Sequence[Candidate],
    settings: SelectSettings,
    speeds: Callable[[Prefix], SpeedMeter],
    ship: Callable[[Sequence[Block]], Shipped[T]],
    listener: Listener,
) -> tuple[T, Curve | None]:
    """What ``ship`` makes of the layers to linearize, ascending, and the K curve, if one was measured.

    Layers are chosen by the fits that the curve is of. Where what ships is something else, its own loss is weighed,
    too, and fewer layers are taken until it is within the budget.

    Raises :class:`InputError` for a K larger than the number of attention layers, and :class:`BudgetError` for a budget
    that no K meets.
    """
    way, budget = choosing.way(candidates), settings.budget
    count = len(all_parts(candidate.layer for candidate in candidates))

    def frontier(k: int) -> Frontier:
        chosen = Measured(way, choosing.curve(way, k, budget))
        return measured(choosing, candidates, chosen, budget) if settings.frontier else Frontier(chosen)

    if settings.k is not None:
        check_k(settings.k, (candidate.layer for candidate in candidates))
        found = (
            frontier(settings.k) if choosing.searched or settings.frontier else Frontier(Measured(way, ()))
        )
        best = sorted(way.prefix(settings.k))
        if settings.k and not best:
            raise InputError(
                f"--k {settings.k} is less than the best block replaces, which is a span of layers: ask for a larger "
                "K, or calibrate without spans (--blocks both)."
            )
        return ship(best).made, _curve(choosing, found, settings, len(all_parts(best)), None)
    meter = speeds(way.prefix)
    why = meter.missing
    least = 0
    if budget.min_speedup is not None:
        if why:
            raise InputError(f"--min-speedup cannot be measured: {why}.")
        least = meter.least_k(budget.min_speedup, count)
    least = max(least, choosing.least_k(way.prefix, count))
    found = frontier(count if budget.bounds_loss else least)
    if budget.bounds_loss and not least and settings.workload:
        found = found.fastest(choosing, budget)
    prefix, points = found.chosen.way.prefix, found.chosen.points
    if prefix is not way.prefix:
        meter = speeds(prefix)
    most = largest_within(points, budget) if budget.bounds_loss else least
    if most < max(least, 1):
        raise BudgetError(_budget_error(points, budget, most, least))
    ks = [k for k in range(most, max(least, 1) - 1, -1) if len(all_parts(prefix(k))) == k]
    made, k = _within(budget, ks, prefix, meter, ship, listener)
    if why:
        listener.note(f"The K curve has no speeds: {why}.")
        return made, _curve(choosing, found, settings, k, None)
    # A workload may take minutes: only what ships is timed.
    for at in [k] if settings.workload else points_of([point.k for point in points], k):
        meter(at)
    timed = replace(found.chosen, points=[_timed(point, meter) for point in points])
    return made, _curve(choosing, replace(found, chosen=timed), settings, k, meter.context)


def _timed(point: CurvePoint, meter: SpeedMeter) -> CurvePoint:
    found = meter.found.get(point.k)
    if found is None:
        return point
    return replace(
        point,
        prefill_speedup=found.prefill,
        decode_speedup=found.decode,
        timed_speedup=found.workload,
    )


def _within(
    budget: Budget,
    ks: Sequence[int],
    prefix: Prefix,
    meter: SpeedMeter,
    ship: Callable[[Sequence[Block]], Shipped[T]],
    listener: Listener,
) -> tuple[T, int]:
    """What ships of the first of ``ks`` that is within the budget as it ships, and that K."""
    cost = ""
    for k in ks:
        # The last is the least that is fast enough, which was timed to find it.
        if k != ks[-1] and budget.min_speedup is not None and meter(k).least < budget.min_speedup:
            listener.note(f"K = {k} is {meter(k).least:.2f} times as fast, less than --min-speedup asks for.")
            continue
        shipped = ship(sorted(prefix(k)))
        if shipped.loss is None or keeps(budget, shipped.loss):
            return shipped.made, k
        cost = f"K = {k} costs {_cost(shipped.loss)} as it ships"
        listener.note(f"{cost}, more than the budget.")
    raise BudgetError(
        f"No K meets the budget with the fit, the repair or the rank asked for: {cost}: allow more loss, or ask for a "
        "larger --rank or another --fit."
    )


def _cost(loss: Loss | CurvePoint) -> str:
    return (
        f"a KL of {loss.kl:.3g} and a perplexity ratio of {loss.perplexity_ratio:.3f} on the selection text"
    )


def _asks(budget: Budget) -> str:
    """What of the ``budget`` asks for a number of layers, as it was given."""
    speedup = budget.min_speedup
    asked = {
        "--min-speedup": None if speedup is None else f"{speedup:g}",
        "--max-weight-bytes": budget.max_weight_bytes,
        "--max-kv-bytes": budget.max_kv_bytes,
    }
    return ", ".join(f"{option} {value}" for option, value in asked.items() if value is not None)


def _budget_error(points: Sequence[CurvePoint], budget: Budget, k: int, least: int) -> str:
    first = points[0]
    cost = f"K = {first.k} costs {_cost(first)}"
    if least > 1:
        return (
            f"No K meets the budget: {_asks(budget)} needs {least} linear layers, and the loss "
            f"allows {k} ({cost}): allow more loss, or ask for less of the other."
        )
    return f"No K meets the budget, since {cost}: allow more loss, or give --k."


def _curve(
    choosing: Choosing, found: Frontier, settings: SelectSettings, chosen: int, context: int | None
) -> Curve | None:
    points = found.chosen.points
    if not points:
        return None
    curve = Curve(tuple(points), chosen, settings.budget, context, *choosing.described)
    if not settings.workload:
        return curve
    return replace(curve, name=found.chosen.way.name, others=found.lines)
