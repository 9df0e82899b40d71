"""What the processes of a selection do for each other: fit and score layers, measure losses and sensitivities.

Each candidate is measured whole by one process, so that its figures do not depend on how many there are. The first
process leads (:meth:`nbl_export.ranks.Ranks.leading`); with one process, everything is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from nbl_export.blocks import Block
from nbl_export.calibrate.moments import Moments, load_moments
from nbl_export.linearize.figures import Candidate, Loss
from nbl_export.linearize.plan import Replacement
from nbl_export.linearize.scores import score_layer
from nbl_export.linearize.search import NOISE, MeasuredSets, measured_losses, sensitivity
from nbl_export.models.candidates import block_modules
from nbl_export.progress import Listener
from nbl_export.ranks import Job
from nbl_export.settings import SelectSettings
from nbl_export.stages.run import Run
from nbl_export.stages.select.linear_layers import Fitting
from nbl_export.stages.select.measured import Measured

if TYPE_CHECKING:
    from nbl_export.linearize.loss import LossMeter

# The linear layers that are measured: those of Fitting by these names.
Linear = Literal["for_choosing", "dropped"]


class Jobs:
    """The moments, fits and measurements of a selection, each made on first use, and what is asked of all processes."""

    def __init__(self, run: Run, calibrated: str, settings: SelectSettings, listener: Listener) -> None:
        self._run, self._settings, self._listener = run, settings, listener
        self._ranks = run.ranks
        self.measured = Measured(run, calibrated, settings.fit_input, listener)
        self.by_name: Mapping[str, Job] = {
            "scores": self._scores,
            "meter": self._meter,
            "losses": self._losses,
            "sensitivities": self._sensitivities,
        }

    def close(self) -> None:
        self.measured.close()

    @cached_property
    def _loaded(self) -> tuple[Moments, dict[str, Any]]:
        return load_moments(self._run.workspace.moments)

    @property
    def moments(self) -> Moments:
        return self._loaded[0]

    @property
    def metadata(self) -> dict[str, Any]:
        return self._loaded[1]

    @cached_property
    def fitting(self) -> Fitting:
        dtype = self.metadata.get("dtype", "float32")
        model = self._run.model
        return Fitting(
            self.moments,
            self.measured,
            self._settings,
            self._listener,
            lambda: self.measured.seeing(model.in_dtype(dtype)),
        )

    # what the first process asks for -----------------------------------------------------------

    def scores(self, layers: Sequence[Block]) -> list[Candidate]:
        """The fits and scores of ``layers``."""
        return self._ask("scores", layers)

    @cached_property
    def meter(self) -> LossMeter:
        """Measures losses; every process has one of its own, made at the same time."""
        self._ask("meter", range(self._ranks.count), self.measured.dtype)
        return self.measured.meter

    def sets(self, linear: Linear, **fitted: Any) -> MeasuredSets:
        """The losses of sets of ``linear`` layers, which depend only on ``fitted`` and the calibration."""

        def measure(sets: Sequence[Sequence[Block]], settled: frozenset[Block], roughly: bool) -> list[Loss]:
            return self._ask("losses", sets, linear, settled, roughly)

        cache = self.measured.cache(fit_input=self._settings.fit_input, **fitted)
        return MeasuredSets(
            lambda: self.meter, getattr(self.fitting, linear), cache, measure, self._ranks.count
        )

    def sensitivities(self, layers: Sequence[Block]) -> Iterator[Loss]:
        """The sensitivity of each of ``layers``, as many at once as there are processes."""
        cache = self.measured.cache(what="noise", share=NOISE)
        unknown = [layer for layer in layers if str(layer) not in cache]
        for layer in layers:
            if str(layer) not in cache:
                some, unknown = unknown[: self._ranks.count], unknown[self._ranks.count :]
                self.meter  # noqa: B018  made by all at the same time
                losses = self._ask("sensitivities", some)
                cache.put({str(i): loss for i, loss in zip(some, losses, strict=True)})
            yield cache.get(str(layer), _known)

    def _ask(self, name: str, items: Sequence[Any], *common: Any) -> list[Any]:
        return self._ranks.ask(self.by_name, name, items, *common)

    # the share of each process -----------------------------------------------------------------

    def _scores(self, layers: Sequence[Block]) -> list[Candidate]:
        ridge = self.fitting.scoring_ridge
        return [score_layer(self.moments, i, self._settings.fit_input, ridge) for i in layers]

    def _meter(self, share: Sequence[Block], dtype: str) -> list[None]:
        self.measured.dtype = dtype  # another machine may be fastest in another one
        self.measured.meter  # noqa: B018
        return [None for _ in share]

    def _losses(
        self, sets: Sequence[Sequence[Block]], linear: Linear, settled: frozenset[Block], roughly: bool
    ) -> list[Loss]:
        layers: Mapping[Block, Replacement] = getattr(self.fitting, linear)
        return measured_losses(self.measured.meter, layers, sets, settled, roughly) if sets else []

    def _sensitivities(self, layers: Sequence[Block]) -> list[Loss]:
        model = self.measured.model
        return [
            sensitivity(self.measured.meter, block_modules(model, i), self.fitting.energy(i)) for i in layers
        ]


def _known() -> Loss:
    raise AssertionError("measured before it is asked for")
