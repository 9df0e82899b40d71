"""What can become linear, ranked by a criterion: the losses of sets of layers, their order, and what they save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbl_export.blocks import ATTENTION, MLP, PARTS, SPAN, Block, Span, all_parts, part_of, with_block
from nbl_export.errors import BudgetError, InputError
from nbl_export.linearize.budget import CurvePoint, keeps, largest_within, loss_curve
from nbl_export.linearize.figures import Candidate, Loss, per_saving
from nbl_export.linearize.scores import CRITERIA, ranking
from nbl_export.linearize.search import (
    GREEDY_TRIES,
    MeasuredSets,
    Prefixes,
    capped,
    count_blocks,
    greedy_path,
    measured_alone,
    ranked_path,
    single_layer_losses,
)
from nbl_export.progress import Listener
from nbl_export.settings import Budget, SelectSettings
from nbl_export.settings.size import bytes_of

if TYPE_CHECKING:
    from nbl_export.stages.select.jobs import Jobs
    from nbl_export.verify.speed.savings import Savings

# The best blocks that replace at most K attentions and MLPs, for any K.
Prefix = Callable[[int], Sequence[Block]]
# The names of ways to save time (:class:`Way`).
BOTH, ONLY_ATTENTION, ONLY_MLPS, ONLY_SPANS, DROPPED = "both", "attention", "MLPs", "spans", "dropped"
_ONLY = {ATTENTION: ONLY_ATTENTION, MLP: ONLY_MLPS, SPAN: ONLY_SPANS}
WITH_SPANS = "all"


@dataclass(frozen=True)
class Way:
    """What becomes linear or is dropped: which ``blocks``, the best first, the losses of sets, what each saves."""

    name: str
    blocks: tuple[Block, ...]
    prefix: Prefix
    sets: Callable[[], MeasuredSets]
    used: Savings | None


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
        # A search tries longer spans where they may be best.
        wanted = [c for c in candidates if not self.searched or measured_alone(c.layer)]
        found: dict[Block, Candidate] = {}
        with self._listener.task("Measuring layers", len(wanted), "layers") as task:
            for candidate in measure(wanted):
                found[candidate.layer] = candidate
                task.advance(1)
        return tuple(found.get(c.layer, c) for c in candidates)

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

    @property
    def kl_tokens(self) -> int:
        """The predictions that the KL of a single layer is a mean of."""
        meter = self._jobs.meter
        return (meter.rough if self.searched else meter).tokens

    def _kl(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        for candidate, loss in _singly(self.sets, candidates, roughly=self.searched):
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

    @property
    def least_speedup(self) -> float | None:
        """How many times as fast the workload has to be."""
        return self._settings.budget.min_speedup

    def way(self, candidates: Sequence[Candidate]) -> Way:
        """Linear layers, the best of the scored ``candidates`` first."""
        assert self._settings.criterion is not None
        order = self._order(candidates, self._settings.criterion, lambda: self.sets, self._used)
        return Way(_name(_blocks(candidates)), _blocks(candidates), order, lambda: self.sets, self._used)

    def others(self, candidates: Sequence[Candidate]) -> list[Way]:
        """What else the scored ``candidates`` allow: one part alone and, a baseline that does not ship, all dropped."""
        parts = [[c for c in candidates if part_of(c.layer) == part] for part in (*PARTS, SPAN)]
        some = [own for own in parts if own]
        return [*(self.way(own) for own in (some if len(some) > 1 else ())), *self.baseline(candidates)]

    def baseline(self, candidates: Sequence[Candidate]) -> list[Way]:
        """The scored ``candidates`` dropped, unless the fit drops them all the same."""
        if self._settings.fit == "drop":
            return []
        sets = self._jobs.sets("dropped", fit="drop", ridge=None)
        used = self._used and self._used.dropping()
        criterion = self._settings.criterion if self.searched else "drop"
        if not self.searched:
            candidates = tuple(self._drop(candidates))
        assert criterion is not None
        order = self._order(candidates, criterion, lambda: sets, used)
        return [Way(DROPPED, _blocks(candidates), order, lambda: sets, used)]

    def _order(
        self,
        candidates: Sequence[Candidate],
        criterion: str,
        sets: Callable[[], MeasuredSets],
        used: Savings | None,
    ) -> Prefix:
        def saves(blocks: Sequence[Block]) -> float:
            return used.ms() - used.ms(blocks) if used else count_blocks(blocks)

        least = self.least_speedup
        saved = capped(saves, used.ms() * (1 - 1 / least)) if used and least else saves

        def path() -> Iterator[tuple[Block, ...]]:
            if not self.searched:
                order = ranking(candidates, criterion, lambda block: saved([block]))
                yield from ranked_path(c.layer for c in order)
            else:
                blocks = _blocks(candidates)
                singles = single_layer_losses(sets(), filter(measured_alone, blocks))
                longer = [b for b in blocks if isinstance(b, Span) and not measured_alone(b)]
                yield from greedy_path(sets(), singles, saved, longer)

        return Prefixes(path(), any(isinstance(c.layer, Span) for c in candidates))

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

    def curve(self, way: Way, most: int, budget: Budget) -> list[CurvePoint]:
        """The losses of K = 1, 2 …, up to ``most`` or until the ``budget`` is exceeded."""
        title = f"K curve: {way.name}" if self._settings.frontier else "Measuring the K curve"
        with self._listener.task(title, most, "layers") as task:
            done = 0

            def loss(layers: Sequence[Block]) -> Loss:
                nonlocal done
                found = way.sets().loss(layers)
                task.advance(len(all_parts(layers)) - done)
                done = len(all_parts(layers))
                return found

            points = loss_curve(way.prefix, loss, most, budget)
        return [_used(point, way) for point in points]

    def filled(
        self, way: Way, points: Sequence[CurvePoint], budget: Budget, blocks: Sequence[Block]
    ) -> tuple[Way, list[CurvePoint]]:
        """``way`` with those of ``blocks`` that the ``budget`` of loss has room for beyond its largest K.

        Blocks are unequal for a workload: the next one may be too much where a smaller one is not. The points beyond
        the budget are then those of the filled way, which has another name where another part of layers fills it.
        """
        k = largest_within(points, budget)
        kept, base = [p for p in points if p.k <= k], next((p.kl for p in points if p.k == k), 0.0)
        filled = [tuple(way.prefix(k))]
        with self._listener.task("Filling the budget", GREEDY_TRIES, "sets") as task:
            while larger := self._filling(way, blocks, filled[-1], base, budget, task.advance):
                filled.append(larger)
                point = _used(CurvePoint.of(larger, way.sets().loss(larger)), way)
                # A span may take the place of all its parts, which are as many.
                kept = [*(other for other in kept if other.k < point.k), point]
                base = point.kl
        if len(filled) == 1:
            return way, list(points)

        def path() -> Iterator[tuple[Block, ...]]:
            before = dict.fromkeys(tuple(way.prefix(count)) for count in range(1, k + 1))
            yield from (found for found in (*before, *filled[1:]) if found)

        return replace(way, name=_name(filled[-1]), prefix=Prefixes(path(), spans=True)), kept

    def _filling(
        self,
        way: Way,
        blocks: Sequence[Block],
        chosen: tuple[Block, ...],
        base: float,
        budget: Budget,
        advance: Callable[[int], None],
    ) -> tuple[Block, ...] | None:
        """``chosen`` with the block that can still be added, the one with the smallest loss for what it saves; None if
        none can."""
        assert way.used is not None
        sets, used = way.sets(), way.used
        nexts = ((block, with_block(chosen, block)) for block in blocks)
        larger = {
            block: found
            for block, found in nexts
            if found is not None and (measured_alone(block) or len(found) <= len(chosen))
        }
        singles = single_layer_losses(sets, larger)
        tried = sorted(singles, key=lambda b: (singles[b].kl, b))[:GREEDY_TRIES]
        sets.settle(chosen)
        sets.announce(larger[block] for block in tried)
        rates: dict[Block, float] = {}
        for block in tried:
            loss = sets.loss(larger[block])
            advance(1)
            saved = used.ms(chosen) - used.ms(larger[block])
            if keeps(budget, loss) and saved > 0:
                rates[block] = per_saving(loss.kl - base, saved)
        return larger[min(rates, key=lambda b: (rates[b], b))] if rates else None


def _singly(
    sets: MeasuredSets, candidates: Sequence[Candidate], roughly: bool = False
) -> Iterator[tuple[Candidate, Loss]]:
    """Each of ``candidates`` with the loss of its layer alone."""
    measure = sets.rough_loss if roughly else sets.loss
    sets.announce([candidate.layer] for candidate in candidates)
    for candidate in candidates:
        yield candidate, measure([candidate.layer])


def _used(point: CurvePoint, way: Way) -> CurvePoint:
    """``point`` with what the workload gains."""
    return replace(point, workload_speedup=way.used.speedup(point.layers)) if way.used else point


def _blocks(candidates: Sequence[Candidate]) -> tuple[Block, ...]:
    return tuple(c.layer for c in candidates)


def _name(blocks: Iterable[Block]) -> str:
    parts = {part_of(block) for block in blocks}
    if len(parts) == 1:
        return _ONLY[parts.pop()]
    return WITH_SPANS if SPAN in parts else BOTH
