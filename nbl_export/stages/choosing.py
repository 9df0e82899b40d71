"""Choose the layers: rank them, measure what K of them cost, and take as many as asked for or as a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from nbl_export.blocks import Block, Span, all_parts, with_block
from nbl_export.errors import BudgetError, InputError
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.scores import CRITERIA, ranking, with_loss
from nbl_export.linearize.search import (
    GREEDY_TRIES,
    MeasuredSets,
    Prefixes,
    Saved,
    capped,
    count_blocks,
    greedy_path,
    largest_within,
    loss_curve,
    measured_alone,
    ranked_path,
    single_layer_losses,
)
from nbl_export.linearize.selection import (
    Candidate,
    Cost,
    Curve,
    CurvePoint,
    Loss,
    PlanLoss,
    keeps,
    per_saving,
)
from nbl_export.linearize.stability import stability, undecided
from nbl_export.settings import Budget
from nbl_export.settings.definition import bytes_of
from nbl_export.stages.measuring import Measuring
from nbl_export.stages.speed_by_k import Prefix, SpeedMeter
from nbl_export.verify.speed.ceiling import Savings

# The plan of what was chosen, and its loss: None where it is that of the K curve.
Shipped = tuple[Plan, PlanLoss | None]
Ship = Callable[[Sequence[Block]], Shipped]


class Choosing:
    """Ranks the layers of a model by a criterion, and for a workload by that for what they save; takes the best.

    ``empty`` is a plan without layers.
    """

    def __init__(self, measuring: Measuring, empty: Plan, savings: Savings | None = None) -> None:
        self._empty, self._measuring = empty, measuring
        self._settings, self._listener = measuring.settings, measuring.listener
        self._budget, self._criterion = self._settings.budget, CRITERIA[str(self._settings.criterion)]
        self._savings, self._used = savings, savings if self._settings.workload else None

    @cached_property
    def sets(self) -> MeasuredSets:
        """The losses of sets of layers, with the fits that layers are chosen by."""
        # A sequential fit depends on the set, so layers are chosen by the LMMSE fit.
        fit = "lmmse" if self._settings.fit == "sequential" else self._settings.fit
        ridge = None if fit == "drop" else self._settings.ridge
        return self._measuring.sets("for_choosing", fit=fit, ridge=ridge)

    def scored(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """``candidates`` with the scores that the criterion measures for each single layer, and what each saves."""
        if self._used:
            candidates = [replace(c, saved_ms=self._used.saved_ms(c.layer)) for c in candidates]
        measures = self._criterion.measures
        if measures is None:
            return tuple(candidates)
        # A search tries longer spans where they may be best.
        wanted = [c for c in candidates if not self._criterion.searched or measured_alone(c.layer)]
        found: dict[Block, Candidate] = {}
        with self._listener.task("Measuring layers", len(wanted), "layers") as task:
            for candidate, loss in zip(wanted, self._singly([c.layer for c in wanted]), strict=True):
                found[candidate.layer] = with_loss(candidate, measures, loss)
                task.advance(1)
        return tuple(found.get(c.layer, c) for c in candidates)

    def _singly(self, layers: Sequence[Block]) -> Iterator[Loss]:
        """What the criterion measures of each of ``layers`` alone."""
        if self._settings.criterion == "linearity":
            yield from self._measuring.sensitivities(layers)
            return
        dropped = self._settings.criterion == "drop"
        sets = self._measuring.sets("dropped", fit="drop", ridge=None) if dropped else self.sets
        sets.announce([layer] for layer in layers)
        for layer in layers:
            yield (sets.rough_loss if self._criterion.searched else sets.loss)([layer])

    @property
    def kl_tokens(self) -> int:
        """The predictions that the KL of a single layer is a mean of."""
        meter = self._measuring.meter
        return ((meter.parts[0] if self._criterion.searched else None) or meter).tokens

    @cached_property
    def _saved(self) -> Saved:
        """What a set saves: of the workload, or as many as it has."""
        used, least = self._used, self._budget.min_speedup
        if not used:
            return count_blocks

        def saves(blocks: Sequence[Block]) -> float:
            return used.ms() - used.ms(blocks)

        return capped(saves, used.ms() * (1 - 1 / least)) if least else saves

    def judged_stable(
        self, candidates: Sequence[Candidate], chosen: Sequence[Block]
    ) -> tuple[Candidate, ...]:
        """``candidates``, with how often each would be ``chosen`` by other documents, where that is known.

        A note names those on which the text does not decide.
        """
        blocks, prefix = [c.layer for c in candidates], self._prefix
        if not self._criterion.searched or any(isinstance(block, Span) for block in blocks):
            return tuple(candidates)
        path = list(map(prefix, range(1, len(chosen) + 1)))
        if not path or set(path[-1]) != set(chosen):  # a budget was filled
            return tuple(candidates)
        found = stability(self.sets, path, blocks, self._saved, self._settings.seed)
        if said := undecided(found):
            self._listener.note(f"{said} More of it decides (--selection-samples).")
        return tuple(replace(c, stable=found.get(c.layer)) for c in candidates)

    def order(self, candidates: Sequence[Candidate]) -> Prefixes:
        """The best of the scored ``candidates`` for every K."""
        saved = self._saved
        blocks = [c.layer for c in candidates]

        def path() -> Iterator[tuple[Block, ...]]:
            if not self._criterion.searched:
                best = ranking(candidates, str(self._settings.criterion), lambda block: saved([block]))
                yield from ranked_path(c.layer for c in best)
                return
            singles = single_layer_losses(self.sets, filter(measured_alone, blocks))
            longer = [b for b in blocks if isinstance(b, Span) and not measured_alone(b)]
            yield from greedy_path(self.sets, singles, saved, longer)

        return Prefixes(path(), any(isinstance(block, Span) for block in blocks))

    def choose(self, candidates: Sequence[Candidate], ship: Ship) -> tuple[Shipped, Curve | None]:
        """What ``ship`` makes of the layers to linearize, ascending, and the K curve, if one was measured.

        Layers are chosen by the fits that the curve is of. Where what ships is something else, its own loss is weighed,
        too, and fewer layers are taken until it is within the budget.

        Raises :class:`BudgetError` for a budget that no K meets.
        """
        budget, blocks = self._budget, [candidate.layer for candidate in candidates]
        prefix: Prefix = self.order(candidates)
        self._prefix = prefix
        if self._settings.k is not None:
            points = self.measure_curve(prefix, self._settings.k) if self._criterion.searched else []
            best = sorted(prefix(self._settings.k))
            if self._settings.k and not best:
                raise InputError(
                    f"--k {self._settings.k} is less than the best block replaces, which is a span of layers: ask for "
                    "a larger K, or calibrate without spans (--blocks both)."
                )
            if (taken := len(all_parts(best))) < self._settings.k:
                self._listener.note(
                    f"{taken} of the {self._settings.k} attentions and MLPs of --k are linear, as the next best block "
                    "is a span of layers that replaces more: ask for a larger K, or calibrate with --blocks both."
                )
            return ship(best), self._curve(points, taken)
        count, meter = len(all_parts(blocks)), SpeedMeter(self._measuring, self._empty, prefix)
        why, least = meter.missing(), self._least_k(prefix, count)
        if budget.min_speedup is not None:
            if why:
                raise InputError(f"--min-speedup cannot be measured: {why}.")
            least = max(least, meter.least_k(budget.min_speedup, count))
        points = self.measure_curve(prefix, count if budget.bounds_loss else least)
        if budget.bounds_loss and not least and self._settings.workload:
            prefix, points = self.fill(prefix, points, blocks)
            meter = SpeedMeter(self._measuring, self._empty, prefix)
        most = largest_within(points, budget) if budget.bounds_loss else least
        if most < max(least, 1):
            raise BudgetError(_why_no_k(points, budget, most, least))
        ks = [k for k in range(most, max(least, 1) - 1, -1) if len(all_parts(prefix(k))) == k]
        made, k = self._first_within(ks, prefix, meter, ship)
        if why:
            self._listener.note(f"The K curve has no speeds: {why}.")
            return made, self._curve(points, k)
        # A workload may take minutes: only what ships is timed.
        for at in [k] if self._settings.workload else _timed_ks([point.k for point in points], k):
            meter(at)
        timed = [replace(p, **meter.found.get(p.k, {})) for p in points]
        return made, self._curve(timed, k, meter.context)

    def _least_k(self, prefix: Prefix, most: int) -> int:
        """The smallest K whose weights and KV cache are within the budget; 0 where it does not bound them.

        Raises :class:`BudgetError` if not even ``most`` are enough, and :class:`InputError` if none are needed.
        """
        least = 0
        for what in ("weight_bytes", "kv_bytes"):
            limit, option = getattr(self._budget, f"max_{what}"), f"--max-{what.replace('_', '-')}"
            if limit is None:
                continue
            size: Callable[..., int] = getattr(self._savings, what)
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

    def measure_curve(self, prefix: Prefix, most: int) -> list[CurvePoint]:
        """The losses of K = 1, 2 …, up to ``most`` or until the budget is exceeded."""
        with self._listener.task("Measuring the K curve", most, "layers") as task:
            done = 0

            def loss(layers: Sequence[Block]) -> Loss:
                nonlocal done
                found = self.sets.loss(layers)
                task.advance(len(all_parts(layers)) - done)
                done = len(all_parts(layers))
                return found

            return list(map(self._gaining, loss_curve(prefix, loss, most, self._budget)))

    def fill(
        self, prefix: Prefix, points: list[CurvePoint], blocks: Sequence[Block]
    ) -> tuple[Prefix, list[CurvePoint]]:
        """The order with those of ``blocks`` that the budget of loss has room for beyond its largest K.

        Blocks are unequal for a workload: the next one may be too much where a smaller one is not.
        """
        k = largest_within(points, self._budget)
        kept, base = [p for p in points if p.k <= k], next((p.kl for p in points if p.k == k), 0.0)
        filled = [tuple(prefix(k))]
        with self._listener.task("Filling the budget", GREEDY_TRIES, "sets") as task:
            while larger := self._one_more(blocks, filled[-1], base, task.advance):
                filled.append(larger)
                point = self._gaining(CurvePoint.of(larger, self.sets.loss(larger)))
                # A span may take the place of all its parts, which are as many.
                kept = [*(other for other in kept if other.k < point.k), point]
                base = point.kl
        if len(filled) == 1:
            return prefix, points
        before = dict.fromkeys(tuple(prefix(count)) for count in range(1, k + 1))
        return Prefixes((found for found in (*before, *filled[1:]) if found), spans=True), kept

    def _one_more(
        self,
        blocks: Sequence[Block],
        chosen: tuple[Block, ...],
        base: float,
        advance: Callable[[int], None],
    ) -> tuple[Block, ...] | None:
        """``chosen`` with the block that still fits and loses least for what it saves; None if none does."""
        assert self._used is not None
        nexts = ((block, with_block(chosen, block)) for block in blocks)
        larger = {
            block: found
            for block, found in nexts
            if found is not None and (measured_alone(block) or len(found) <= len(chosen))
        }
        singles = single_layer_losses(self.sets, larger)
        tried = sorted(singles, key=lambda b: (singles[b].kl, b))[:GREEDY_TRIES]
        self.sets.settle(chosen)
        self.sets.announce(larger[block] for block in tried)
        rates: dict[Block, float] = {}
        for block in tried:
            loss = self.sets.loss(larger[block])
            advance(1)
            saved = self._used.ms(chosen) - self._used.ms(larger[block])
            if keeps(self._budget, loss) and saved > 0:
                rates[block] = per_saving(loss.kl - base, saved)
        return larger[min(rates, key=lambda b: (rates[b], b))] if rates else None

    def _gaining(self, point: CurvePoint) -> CurvePoint:
        """``point`` with what the workload gains."""
        return replace(point, workload_speedup=self._used.speedup(point.layers)) if self._used else point

    def _first_within(
        self, ks: Sequence[int], prefix: Prefix, meter: SpeedMeter, ship: Ship
    ) -> tuple[Shipped, int]:
        """What ships of the first of ``ks`` that is within the budget as it ships, and that K."""
        cost, mend, least = "", "", self._budget.min_speedup
        for k in ks:
            # The last is the least that is fast enough, which was timed to find it.
            if k != ks[-1] and least is not None and (speed := meter.least(k)) < least:
                self._listener.note(
                    f"K = {k} is {speed:.2f} times as fast, less than --min-speedup asks for."
                )
                continue
            shipped = ship(sorted(prefix(k)))
            loss: Cost | None = shipped[1].loss if shipped[1] else None
            where, mend = "as it ships", "ask for a larger --rank or another --fit"
            if self._budget.bounds_loss and (loss is None or keeps(self._budget, loss)):
                loss, where = self._measuring.heldout_loss(shipped[0]), "on held-out text"
                mend = "choose on more text (--selection-samples)"
            if loss is None or keeps(self._budget, loss):
                return shipped, k
            cost = f"K = {k} costs {_cost(loss)} {where}"
            self._listener.note(f"{cost}, more than the budget.")
        raise BudgetError(
            f"No K meets the budget with the fit, the repair or the rank asked for: {cost}: allow more loss, or {mend}."
        )

    def _curve(self, points: Sequence[CurvePoint], chosen: int, context: int | None = None) -> Curve | None:
        """The ``points`` as they are kept, with the size of the text that they are measured on."""
        if not points:
            return None
        owners = self._measuring.text.selection_document[:, 1:]
        counted = owners[owners >= 0]  # not the tokens of images
        return Curve(tuple(points), chosen, self._budget, context, int(counted.size), len(np.unique(counted)))


def _cost(loss: Cost) -> str:
    return f"a KL of {loss.kl:.3g} and a perplexity ratio of {loss.perplexity_ratio:.3f}"


def _why_no_k(points: Sequence[CurvePoint], budget: Budget, k: int, least: int) -> str:
    cost = f"K = {points[0].k} costs {_cost(points[0])} on the selection text"
    if least <= 1:
        return f"No K meets the budget, since {cost}: allow more loss, or give --k."
    speedup = None if budget.min_speedup is None else f"{budget.min_speedup:g}"
    asked = {
        "--min-speedup": speedup,
        "--max-weight-bytes": budget.max_weight_bytes,
        "--max-kv-bytes": budget.max_kv_bytes,
    }
    asks = ", ".join(f"{option} {value}" for option, value in asked.items() if value is not None)
    return (
        f"No K meets the budget: {asks} needs {least} linear layers, and the loss allows {k} ({cost}): allow more "
        "loss, or ask for less of the other."
    )


def _timed_ks(ks: Sequence[int], chosen: int) -> Sequence[int]:
    """Those of the ``ks`` of a curve that are timed: a few, evenly up to the last, and the one that was chosen."""
    evenly = (ks[-1] * part / 4 for part in range(1, 5))
    return sorted(
        {min(ks, key=lambda k: abs(k - round(at))) for at in evenly} | ({chosen} if chosen else set())
    )
