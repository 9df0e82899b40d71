"""What can become linear, ranked by a criterion: the losses of sets of layers, their order, and what they save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbl_export.blocks import ATTENTION, PARTS, Block, part_of
from nbl_export.errors import BudgetError, InputError
from nbl_export.linearize.budget import CurvePoint, loss_curve
from nbl_export.linearize.figures import Candidate, Loss
from nbl_export.linearize.scores import CRITERIA, ranking
from nbl_export.progress import Listener
from nbl_export.settings import Budget, SelectSettings
from nbl_export.settings.size import bytes_of

if TYPE_CHECKING:
    from nbl_export.linearize.search import MeasuredSets
    from nbl_export.stages.select.jobs import Jobs
    from nbl_export.verify.speed.savings import Savings

# A function that returns the K best layers, best first, for any K.
Prefix = Callable[[int], Sequence[Block]]
# The names of ways to save time (:class:`Way`).
BOTH, ONLY_ATTENTION, ONLY_MLPS, DROPPED = "both", "attention", "MLPs", "dropped"


@dataclass(frozen=True)
class Way:
    """What becomes linear or is dropped, of ``count`` blocks the best first, the losses of sets, what they save."""

    name: str
    count: int
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

    def way(self, candidates: Sequence[Candidate]) -> Way:
        """Linear layers, the best of the scored ``candidates`` first."""
        assert self._settings.criterion is not None
        order = self._order(candidates, self._settings.criterion, lambda: self.sets, self._used)
        return Way(_name(candidates), len(candidates), order, lambda: self.sets, self._used)

    def others(self, candidates: Sequence[Candidate]) -> list[Way]:
        """What else the scored ``candidates`` allow: one part alone and, a baseline that does not ship, all dropped."""
        parts = [[c for c in candidates if part_of(c.layer) == part] for part in PARTS]
        found = [self.way(some) for some in parts if some] if all(parts) else []
        return found if self._settings.fit == "drop" else [*found, self._dropped(candidates)]

    def _dropped(self, candidates: Sequence[Candidate]) -> Way:
        sets = self._jobs.sets("dropped", fit="drop", ridge=None)
        used = self._used and self._used.dropping()
        criterion = self._settings.criterion if self.searched else "drop"
        if not self.searched:
            candidates = tuple(self._drop(candidates))
        assert criterion is not None
        order = self._order(candidates, criterion, lambda: sets, used)
        return Way(DROPPED, len(candidates), order, lambda: sets, used)

    def _order(
        self,
        candidates: Sequence[Candidate],
        criterion: str,
        sets: Callable[[], MeasuredSets],
        used: Savings | None,
    ) -> Prefix:
        def saved(block: Block, linear: Sequence[Block] = ()) -> float:
            return used.saved_ms(block, linear) if used else 1.0

        if not self.searched:
            order = [c.layer for c in ranking(candidates, criterion, saved)]
            return lambda k: order[:k]

        from nbl_export.linearize.search import greedy_order, single_layer_losses

        def searched(k: int) -> list[Block]:
            singles = single_layer_losses(sets(), [c.layer for c in candidates])
            return greedy_order(sets(), singles, k, lambda linear, block: saved(block, linear))

        return searched

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
        what = f" ({way.name})" if self._settings.frontier else ""
        with self._listener.task(f"Measuring the K curve{what}", most, "layers") as task:

            def loss(layers: Sequence[Block]) -> Loss:
                found = way.sets().loss(layers)
                task.advance(1)
                return found

            points = loss_curve(way.prefix, loss, most, budget)
        if way.used is None:
            return points
        return [replace(p, workload_speedup=way.used.speedup(p.layers)) for p in points]


def _singly(sets: MeasuredSets, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Loss]]:
    """Each of ``candidates`` with the loss of its layer alone."""
    sets.announce([candidate.layer] for candidate in candidates)
    for candidate in candidates:
        yield candidate, sets.loss([candidate.layer])


def _name(candidates: Sequence[Candidate]) -> str:
    parts = {part_of(c.layer) for c in candidates}
    return BOTH if len(parts) > 1 else ONLY_ATTENTION if parts == {ATTENTION} else ONLY_MLPS
