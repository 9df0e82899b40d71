"""Share a selection among several processes: fit and score layers, measure losses and sensitivities.

Each candidate is measured whole by one process, so that its figures do not depend on how many there are. The first
process leads (:meth:`nbl_export.ranks.Ranks.leading`); with one process, everything is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from nbl_export.blocks import Block
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.plan import Replacement
from nbl_export.linearize.scores import score_layer
from nbl_export.linearize.search import NOISE, MeasuredSets, measured_losses, sensitivity
from nbl_export.linearize.selection import Candidate, Loss
from nbl_export.models.candidates import block_modules
from nbl_export.ranks import Job
from nbl_export.stages.select.fitting import Fitting
from nbl_export.stages.select.measured import Measuring

# The linear layers that are measured: those of Fitting by these names.
Linear = Literal["for_choosing", "dropped"]


class Jobs(Measuring):
    """What is measured and fitted, by all processes."""

    @cached_property
    def fitting(self) -> Fitting:
        return Fitting(self, self.settings, self.listener)

    @property
    def by_name(self) -> Mapping[str, Job]:
        """What each process does a share of."""
        return {
            "scores": self._scores,
            "meter": self._meter,
            "losses": self._losses,
            "sensitivities": self._sensitivities,
        }

    # what the first process asks for -------------------------------------------------------------

    def scores(self, layers: Sequence[Block]) -> list[Candidate]:
        """The fits and scores of ``layers``."""
        return self._ask("scores", layers)

    @cached_property
    def meter(self) -> LossMeter:
        """Measures losses; every process has one of its own, made at the same time."""
        self._ask("meter", range(self.run.ranks.count), self.dtype)
        return self.own_meter

    def sets(self, linear: Linear, **fitted: Any) -> MeasuredSets:
        """The losses of sets of ``linear`` layers, which depend only on ``fitted`` and the calibration."""

        def measure(sets: Sequence[Sequence[Block]], settled: frozenset[Block], roughly: bool) -> list[Loss]:
            return self._ask("losses", sets, linear, settled, roughly)

        cache = self.cache(fit_input=self.settings.fit_input, **fitted)
        return MeasuredSets(lambda: self.meter, self.moments.layers, cache, measure, self.run.ranks.count)

    def sensitivities(self, layers: Sequence[Block]) -> Iterator[Loss]:
        """The sensitivity of each of ``layers``, as many at once as there are processes."""
        cache, at_once = self.cache(what="noise", share=NOISE), self.run.ranks.count
        unknown = [layer for layer in layers if str(layer) not in cache]
        for layer in layers:
            if str(layer) not in cache:
                some, unknown = unknown[:at_once], unknown[at_once:]
                self.meter  # noqa: B018  made by all at the same time
                losses = self._ask("sensitivities", some)
                cache.put({str(i): loss for i, loss in zip(some, losses, strict=True)})
            yield cache[str(layer)]

    def _ask(self, name: str, items: Sequence[Any], *common: Any) -> list[Any]:
        return self.run.ranks.ask(self.by_name, name, items, *common)

    # the share of each process -------------------------------------------------------------------

    def _scores(self, layers: Sequence[Block]) -> list[Candidate]:
        ridge = self.fitting.scoring_ridge
        return [score_layer(self.moments, i, self.settings.fit_input, ridge) for i in layers]

    def _meter(self, share: Sequence[Block], dtype: str) -> list[None]:
        self.dtype = dtype  # another machine may be fastest in another one
        self.own_meter  # noqa: B018
        return [None for _ in share]

    def _losses(
        self, sets: Sequence[Sequence[Block]], linear: Linear, settled: frozenset[Block], roughly: bool
    ) -> list[Loss]:
        layers: Mapping[Block, Replacement] = getattr(self.fitting, linear)
        return measured_losses(self.own_meter, layers, sets, settled, roughly) if sets else []

    def _sensitivities(self, layers: Sequence[Block]) -> list[Loss]:
        energy, model = self.fitting.energy, self.model
        return [sensitivity(self.own_meter, block_modules(model, i), energy(i)) for i in layers]
