"""Choose the layers: measure each of them if the criterion needs it, rank them, and take K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from nbl_export.blocks import Block
from nbl_export.errors import BudgetError, InputError
from nbl_export.linearize.budget import CurvePoint, keeps, largest_within, loss_curve
from nbl_export.linearize.figures import Candidate, Loss
from nbl_export.linearize.scores import CRITERIA, check_k, ranking
from nbl_export.linearize.selection import Curve
from nbl_export.progress import Listener
from nbl_export.settings import Budget, SelectSettings
from nbl_export.settings.size import bytes_of
from nbl_export.stages.select.frontier import points_of

if TYPE_CHECKING:
    from nbl_export.linearize.search import MeasuredSets
    from nbl_export.stages.select.frontier import SpeedMeter
    from nbl_export.stages.select.jobs import Jobs
    from nbl_export.verify.speed.savings import Savings

# A function that returns the K best layers, best first, for any K.
Prefix = Callable[[int], Sequence[Block]]
T = TypeVar("T")


@dataclass(frozen=True)
class Shipped(Generic[T]):
    """What was ``made`` of the chosen layers, and its ``loss``: None where it is that of the K curve."""

    made: T
    loss: Loss | None


class Choosing:
    """Ranks the layers of a model by a criterion, and for a workload by that for what they save."""

    def __init__(
        self, settings: SelectSettings, jobs: Jobs, listener: Listener, savings: Savings | None = None
    ) -> None:
        assert settings.criterion is not None
        self._settings, self._listener, self._jobs = settings, listener, jobs
        self._savings, self._used = savings, savings if settings.workload else None
        self._criterion = CRITERIA[settings.criterion]

    @cached_property
    def sets(self) -> MeasuredSets:
        """The losses of sets of layers, with the fits that layers are chosen by."""
        # A sequential fit depends on the set, so layers are chosen by the LMMSE fit.
        fit = "lmmse" if self._settings.fit == "sequential" else self._settings.fit
        ridge = None if fit == "drop" else self._settings.ridge
        return self._jobs.sets("for_choosing", fit=fit, ridge=ridge)

    def scored(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """``candidates`` with the scores that the criterion measures for each single layer, and what each saves."""
        if self._used:
            candidates = [replace(c, saved_ms=self._used.saved_ms(c.layer)) for c in candidates]
        if not self._criterion.measured:
            return tuple(candidates)
        measure = {"drop": self._drop, "linearity": self._linearity}.get(
            self._settings.criterion or "", self._kl
        )
        found = []
        with self._listener.task("Measuring layers", len(candidates), "layers") as task:
            for candidate in measure(candidates):
                found.append(candidate)
                task.advance(1)
        return tuple(found)

    @property
    def searched(self) -> bool:
        """Whether the order is found by measuring sets of layers, which also gives the K curve."""
        return self._criterion.searched

    @property
    def described(self) -> tuple[int, int]:
        """The size of the text that losses are measured on: its predictions and its documents."""
        text = self._jobs.measured.text
        owners = text.selection_document[:, 1:]
        counted = owners[owners >= 0]  # not the tokens of images
        return int(counted.size), len(np.unique(counted))

    def _kl(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        for candidate, loss in _singly(self.sets, candidates):
            yield replace(candidate, kl=loss.kl, kl_se=loss.kl_se)

    def _drop(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        for candidate, loss in _singly(self._jobs.sets("dropped", fit="drop", ridge=None), candidates):
            yield replace(candidate, drop=loss.kl, drop_se=loss.kl_se)

    def _linearity(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        losses = self._jobs.sensitivities([candidate.layer for candidate in candidates])
        for candidate, loss in zip(candidates, losses, strict=True):
            yield replace(
                candidate,
                sensitivity=loss.kl,
                sensitivity_se=loss.kl_se,
                predicted=loss.kl * candidate.nmse,
            )

    def prefix(self, candidates: Sequence[Candidate]) -> Prefix:
        """The best of the scored ``candidates``."""
        if not self._criterion.searched:
            assert self._settings.criterion is not None
            order = [c.layer for c in ranking(candidates, self._settings.criterion, self._saved)]
            return lambda k: order[:k]

        from nbl_export.linearize.search import greedy_order, single_layer_losses

        return lambda k: greedy_order(
            self.sets, single_layer_losses(self.sets), k, lambda linear, block: self._saved(block, linear)
        )

    def _saved(self, block: Block, linear: Sequence[Block] = ()) -> float:
        return self._used.saved_ms(block, linear) if self._used else 1.0

    def least_k(self, prefix: Prefix, most: int) -> int:
        """The smallest K whose weights and KV cache are within the budget; 0 where it does not bound them.

        Raises :class:`BudgetError` if not even ``most`` are enough, and :class:`InputError` if none are needed.
        """
        budget, savings = self._settings.budget, self._savings
        if savings is None:
            return 0
        bounds = (
            ("--max-weight-bytes", budget.max_weight_bytes, savings.weight_bytes),
            ("--max-kv-bytes", budget.max_kv_bytes, savings.kv_bytes),
        )
        least = 0
        for option, limit, size in bounds:
            if limit is None:
                continue
            if size() <= bytes_of(limit):
                raise InputError(
                    f"{option} {limit} asks for nothing: without a linear layer there are {size():,} bytes: ask for "
                    "less."
                )
            found = next((k for k in range(1, most + 1) if size(prefix(k)) <= bytes_of(limit)), None)
            if found is None:
                raise BudgetError(
                    f"{option} {limit} is out of reach: with {most} linear layers there are still "
                    f"{size(prefix(most)):,} bytes: allow more."
                )
            least = max(least, found)
        return least

    def curve(self, prefix: Prefix, most: int) -> list[CurvePoint]:
        """The losses of K = 1, 2 …, up to ``most`` or until the budget is exceeded."""
        with self._listener.task("Measuring the K curve", most, "layers") as task:

            def loss(layers: Sequence[Block]) -> Loss:
                found = self.sets.loss(layers)
                task.advance(1)
                return found

            points = loss_curve(prefix, loss, most, self._settings.budget)
        if self._used is None:
            return points
        return [replace(p, workload_speedup=self._used.speedup(p.layers)) for p in points]


def _singly(sets: MeasuredSets, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Loss]]:
    """Each of ``candidates`` with the loss of its layer alone."""
    sets.announce([candidate.layer] for candidate in candidates)
    for candidate in candidates:
        yield candidate, sets.loss([candidate.layer])


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
    prefix, count = choosing.prefix(candidates), len(candidates)
    if settings.k is not None:
        check_k(settings.k, count)
        points = choosing.curve(prefix, settings.k) if choosing.searched else []
        made = ship(sorted(prefix(settings.k))).made
        return made, _curve(choosing, points, settings, settings.k, None)
    budget, meter = settings.budget, speeds(prefix)
    why = meter.missing
    least = 0
    if budget.min_speedup is not None:
        if why:
            raise InputError(f"--min-speedup cannot be measured: {why}.")
        least = meter.least_k(budget.min_speedup, count)
    least = max(least, choosing.least_k(prefix, count))
    points = choosing.curve(prefix, count if budget.bounds_loss else least)
    most = largest_within(points, budget) if budget.bounds_loss else least
    if most < max(least, 1):
        raise BudgetError(_budget_error(points, budget, most, least))
    made, k = _within(budget, range(most, max(least, 1) - 1, -1), prefix, meter, ship, listener)
    if why:
        listener.note(f"The K curve has no speeds: {why}.")
    else:
        for at in points_of(points[-1].k, k):
            meter(at)
        points = [
            replace(p, prefill_speedup=s.prefill, decode_speedup=s.decode)
            if (s := meter.found.get(p.k))
            else p
            for p in points
        ]
    return made, _curve(choosing, points, settings, k, None if why else meter.context)


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
    choosing: Choosing,
    points: Sequence[CurvePoint],
    settings: SelectSettings,
    chosen: int,
    context: int | None,
) -> Curve | None:
    if not points:
        return None
    return Curve(tuple(points), chosen, settings.budget, context, *choosing.described)
