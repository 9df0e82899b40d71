"""Fit linear layers, and measure with the model what they cost on the selection text; share both among processes.

Each loss is saved in ``nbl/measured.json`` as soon as it is measured, under a key of everything it depends on. An
interrupted selection continues from there, and another K or an earlier setting needs no new measurement.

Each candidate is measured whole by one process, so that its figures do not depend on how many there are. The first
process leads (:meth:`nbl_export.ranks.Ranks.leading`); with one process, everything is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from nbl_export.blocks import Block, as_json, part_of, parts_in
from nbl_export.calibrate.collect import moments_of
from nbl_export.calibrate.moments import LayerMoments, layer_file, load_moments, save_layer
from nbl_export.calibrate.synthetic import SyntheticRow, synthetic_rows
from nbl_export.calibrate.text import CalibrationText, load_text
from nbl_export.errors import InputError
from nbl_export.files import TEMPORARY, read_sealed, sha256_of_json, write_sealed
from nbl_export.linearize.fits import as_layer, sequential_fits, weighted_moments
from nbl_export.linearize.lmmse import (
    RANK_TOLERANCE,
    Covariances,
    LinearFit,
    branch_covariances,
    fit_lmmse,
    rank_within,
    ridge_by_heldout_error,
    truncate,
)
from nbl_export.linearize.loss import LossMeter, loss_of_plan
from nbl_export.linearize.plan import DROPPED, LinearLayer, Plan, Replacement, by_part
from nbl_export.linearize.repair import Distillation, Repaired, repair
from nbl_export.linearize.scores import naming, score_layer
from nbl_export.linearize.search import NOISE, MeasuredSets, measured_losses, sensitivity, usable
from nbl_export.linearize.selection import Candidate, Loss, Sums
from nbl_export.models import load
from nbl_export.models.candidates import block_modules
from nbl_export.models.load import as_setting, load_tokenizer
from nbl_export.models.media_tokens import seeing
from nbl_export.models.weights import resident, room
from nbl_export.processes import Checkpoint
from nbl_export.progress import Listener
from nbl_export.ranks import Job
from nbl_export.records import STAGES
from nbl_export.settings import SelectSettings
from nbl_export.settings.choices import DEFAULT_RIDGE
from nbl_export.stages.run import Run
from nbl_export.verify.loss import measure_method_loss
from nbl_export.verify.parity.figures import MethodLoss

_FORMAT = "nbl-export/measured/2"
# The linear layers that are measured: those of Fitting by these names.
Linear = Literal["for_choosing", "dropped"]


class Measuring(ExitStack):
    """The moments, the text, the fits, and the model in the fastest precision here; each is made on first use.

    When it is closed, the weights and files go that were kept for many measurements.
    """

    def __init__(self, run: Run, calibrated: str, settings: SelectSettings, listener: Listener) -> None:
        self.run, self._calibrated, self.settings, self.listener = run, calibrated, settings, listener
        super().__init__()
        self._seeing: list[torch.nn.Module] = []
        loaded, self.metadata = load_moments(run.workspace.moments)
        self.moments = loaded.layers

    @cached_property
    def fitting(self) -> Fitting:
        return Fitting(self)

    @cached_property
    def text(self) -> CalibrationText:
        return load_text(self.run.workspace.text)

    @cached_property
    def dtype(self) -> str:
        fast = load.fast_dtype(self.run.model.device)
        # What the moments were collected in runs.
        known = fast == "float32" or self.metadata.get("dtype") == fast
        return fast if known else self.run.model.fast_dtype

    @cached_property
    def model(self) -> torch.nn.Module:
        model = self._with_images(self.run.model.in_dtype(self.dtype))
        self.enter_context(resident(model, room(model)))
        return model

    @property
    def reading(self) -> torch.nn.Module:
        """The model in the dtype in which the moments were collected."""
        return self._with_images(self.run.model.in_dtype(self.metadata.get("dtype", "float32")))

    def _with_images(self, model: torch.nn.Module) -> torch.nn.Module:
        """``model``, which takes the images of the text as long as this is open."""
        if self.run.model.task.causal and self.text.media is not None and model not in self._seeing:
            self._seeing.append(model)
            self.enter_context(seeing(model, self.text.media))
        return model

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

        def measure(sets: Sequence[Sequence[Block]], settled: frozenset[Block], part: int) -> list[Sums]:
            return self._ask("losses", sets, linear, settled, part)

        rows = {"synthetic": self.settings.seed if self.settings.sees_synthetic else None}
        known = Losses(self, fit_input=self.settings.fit_input, **rows, **fitted)
        return MeasuredSets(lambda: self.meter, self.moments, known, measure, self.run.ranks.count)

    def sensitivities(self, layers: Sequence[Block]) -> Iterator[Loss]:
        """The sensitivity of each of ``layers``, as many at once as there are processes."""
        known, at_once = Losses(self, what="noise", share=NOISE), self.run.ranks.count
        unknown = [layer for layer in layers if str(layer) not in known]
        for layer in layers:
            if str(layer) not in known:
                some, unknown = unknown[:at_once], unknown[at_once:]
                self.meter  # noqa: B018  made by all at the same time
                found = self._ask("sensitivities", some)
                known.update({str(i): loss for i, loss in zip(some, found, strict=True)})
            yield known[str(layer)].loss

    def loss_of(self, plan: Plan) -> Loss:
        """The loss of the model with ``plan`` applied, on the selection text."""
        return usable(loss_of_plan(self.own_meter, plan), plan.chosen, "replaced as they ship")

    def heldout_loss(self, plan: Plan) -> MethodLoss:
        """The loss of ``plan`` on the held-out text, as ``verify`` measures it."""
        return measure_method_loss(
            self.run.model.in_dtype("float32"),
            plan,
            self.text.heldout,
            self.text.heldout_document,
            self.listener,
        )

    def key(self, **depends: Any) -> str:
        """A key of ``depends``, the calibration, how this version fits, and how and where the model is run."""
        run = {"dtype": self.dtype, **as_setting(self.run.model.device)}
        return sha256_of_json({"calibrate": self._calibrated, **run, "version": STAGES["select"], **depends})

    def _ask(self, name: str, items: Sequence[Any], *common: Any) -> list[Any]:
        return self.run.ranks.ask(self.jobs, name, items, *common)

    # the share of each process -------------------------------------------------------------------

    @property
    def jobs(self) -> Mapping[str, Job]:
        """What each process does a share of, by name."""
        names = ("scores", "meter", "losses", "sensitivities")
        return {name: getattr(self, f"_{name}") for name in names}

    def _scores(self, layers: Sequence[Block]) -> list[Candidate]:
        ridge = self.fitting.scoring_ridge
        return [score_layer(self.moments[i], i, self.settings.fit_input, ridge) for i in layers]

    def _meter(self, share: Sequence[int], dtype: str) -> list[None]:
        self.dtype = dtype  # another machine may be fastest in another one
        self.own_meter  # noqa: B018
        return [None for _ in share]

    @cached_property
    def own_meter(self) -> LossMeter:
        text, owners = self.text.selection, self.text.selection_document
        with self.listener.task("Running the original", text.size, "tokens") as task:
            how = self.settings.fit_input, task.advance, self.listener
            return LossMeter(self.model, text, owners, *how, self._synthetic_rows)

    @cached_property
    def _synthetic_rows(self) -> list[SyntheticRow]:
        if not self.settings.sees_synthetic:
            return []
        return synthetic_rows(self.text, load_tokenizer(self.run.model.source), self.settings.seed)

    def _losses(
        self, sets: Sequence[Sequence[Block]], linear: Linear, settled: frozenset[Block], part: int
    ) -> list[Sums]:
        layers: Mapping[Block, Replacement] = getattr(self.fitting, linear)
        return measured_losses(self.own_meter, layers, sets, settled, part) if sets else []

    def _sensitivities(self, layers: Sequence[Block]) -> list[Sums]:
        energy, model = self.fitting.energy, self.model
        return [sensitivity(self.own_meter, block_modules(model, i), energy(i)) for i in layers]


class Losses(dict[str, Sums]):
    """What was measured, by name, on disk: it depends on the calibration, how the model is run, and ``depends``."""

    def __init__(self, of: Measuring, **depends: Any) -> None:
        self._path, self._key = of.run.workspace.measured, of.key(**depends)
        try:
            known = self._stored().get(self._key, {})
        except InputError:
            of.listener.note(f"{self._path.name} is damaged and was ignored.")
            self._path.unlink()
            known = {}
        super().__init__({name: Sums(**found) for name, found in known.items()})

    def _stored(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        raw = read_sealed(self._path, "The file of measured losses", "")
        return raw["losses"] if raw.get("format") == _FORMAT else {}

    def update(self, losses: Mapping[str, Sums]) -> None:  # type: ignore[override]
        """Store ``losses`` that were measured."""
        super().update(losses)
        # Read again, since another of this run may have written to the file.
        raw = {name: vars(found) for name, found in self.items()}
        write_sealed(self._path, {"format": _FORMAT, "losses": {**self._stored(), self._key: raw}})


class _Made(dict[Block, Replacement]):
    """Linear layers, each fitted by ``make`` at its first use."""

    def __init__(self, make: Callable[[Block], Replacement]) -> None:
        self._make = make

    def __missing__(self, block: Block) -> Replacement:
        self[block] = made = self._make(block)
        return made


class Fitting:
    """Fits W and b as the settings say: of all layers to choose from, and of the chosen ones.

    They are made from the moments of ``measuring``; some read its text again.
    """

    def __init__(self, measuring: Measuring) -> None:
        self._measuring, settings = measuring, measuring.settings
        self._settings, self._listener = settings, measuring.listener
        self._moments = measuring.moments
        self._parts = {part_of(block) for block in self._moments}
        self.dropped: Mapping[Block, Replacement] = dict.fromkeys(self._moments, DROPPED)
        # What replaces every candidate. A sequential fit depends on the chosen layers: they are chosen by others.
        self.for_choosing = self.dropped if settings.fit == "drop" else _Made(self._one_shot)
        # The ridge of the scores that do not need held-out text.
        self.scoring_ridge = DEFAULT_RIDGE if settings.ridge is None else settings.ridge
        # Each layer that was truncated, what became of it, and the lost share.
        self._truncated: dict[Block, tuple[LinearLayer, LinearLayer, float]] = {}

    def _one_shot(self, layer: Block) -> LinearLayer:
        if self._settings.fit == "weighted":
            return self._weighted[layer]
        return as_layer(self._solve(layer, self._moments[layer]))

    def energy(self, layer: Block) -> float:
        """E‖y - μ_y‖² of a layer's output."""
        return float(branch_covariances(self._moments[layer], "normed").c_vv.trace())

    def _covariances(self, layer: Block) -> Covariances:
        return branch_covariances(self._moments[layer], self._settings.fit_input)

    def final(self, chosen: Sequence[Block]) -> dict[Block, Replacement]:
        """What replaces ``chosen`` before any repair."""
        if self._settings.fit != "sequential" or not chosen:
            return {i: self.for_choosing[i] for i in chosen}
        tokens, model = self._measuring.text.calibration, self._measuring.reading
        self._before_fits()
        with self._listener.task("Fitting in sequence", tokens.size * len(chosen), "tokens") as task:
            fits = sequential_fits(model, tokens, chosen, self._settings.fit_input, self._solve, task.advance)
        return {**fits}

    def timed(self, layers: Sequence[Block]) -> Mapping[Block, Replacement]:
        """What ``layers`` are timed with: of the form that ships, whatever the values of W will be."""
        found = {i: self.for_choosing[i] for i in layers}
        return self.truncated(found)[0] if self._settings.truncates else found

    def repaired(self, layers: Mapping[Block, Replacement]) -> Repaired:
        """``layers`` after the distillation steps of the settings, and the adapters of other weights."""
        measuring, settings = self._measuring, self._settings
        # The map of a span stands in the place of its first part.
        first = {i: parts_in(i)[0] for i in layers}
        task = Distillation(
            model=measuring.model,
            replaced=by_part(layers),
            covariances={first[i]: self._covariances(i) for i in layers},
            fit_input=settings.fit_input,
            tokens=measuring.text.calibration,
            steps=settings.repair,
            seed=settings.seed,
            rank=settings.repair_rank,
            exact=measuring.run.model.in_dtype("float32"),
            identity=measuring.key(settings=settings.as_json(), layers=list(map(as_json, sorted(layers)))),
        )
        repaired = repair(task, Checkpoint(measuring.run.workspace.repair_checkpoint), self._listener)
        return replace(repaired, layers={i: repaired.layers[part] for i, part in first.items()})

    def truncated(
        self, layers: Mapping[Block, Replacement]
    ) -> tuple[dict[Block, Replacement], dict[Block, float]]:
        """``layers`` with maps truncated to the rank of the settings or, where it is to be found, each to what costs
        next to nothing; and by layer the lost share of the output's variance."""
        low, lost = dict(layers), dict[Block, float]()
        for index, layer in layers.items():
            if isinstance(layer, LinearLayer):
                kept = self._truncated.get(index)
                # Each K is timed with layers that other K's have, too.
                if kept is None or kept[0] is not layer:
                    kept = self._truncated[index] = (layer, *self._truncate(index, layer))
                _, low[index], lost[index] = kept
        return low, lost

    def _truncate(self, index: Block, layer: LinearLayer) -> tuple[LinearLayer, float]:
        c = self._covariances(index)
        w, b = layer.w.astype(np.float64), layer.b.astype(np.float64)
        rank = rank_within(w, b, c, RANK_TOLERANCE) if self._settings.rank is None else self._settings.rank
        if rank is None:
            return layer, 0.0
        low = truncate(w, b, c, rank)
        return LinearLayer.of_rank(*(a.astype(np.float32) for a in (low.up, low.down, low.b))), low.lost

    def _solve(self, layer: Block, moments: LayerMoments) -> LinearFit:
        ridge, fit_input = self._settings.ridge, self._settings.fit_input
        with naming(layer):
            if ridge is None:
                ridge = ridge_by_heldout_error(moments, self._others[layer], fit_input)
            return fit_lmmse(moments, fit_input, ridge)

    @cached_property
    def _others(self) -> Mapping[Block, LayerMoments]:
        # Moments of the selection text, for the held-out error of a ridge: in files, which go when all is fitted.
        text, nbl = self._measuring.text.selection, self._measuring.run.workspace.nbl
        scratch = TemporaryDirectory(prefix=".select.", suffix=TEMPORARY, dir=nbl)
        folder = Path(self._measuring.enter_context(scratch))
        for block, layer in moments_of(self._measuring.reading, text, self._parts, self._listener):
            save_layer(layer_file(folder, block), block, layer, {})
        return load_moments(folder)[0].layers

    def _before_fits(self) -> None:
        """What fits need that are made while text goes through the model, which is not there then for other text."""
        if self._settings.ridge is None:
            _ = self._others

    @cached_property
    def _weighted(self) -> dict[Block, LinearLayer]:
        # Fitted as the text passes each layer, since the moments of all would take more memory than the layers.
        self._before_fits()
        tokens, fit_input = self._measuring.text.calibration, self._settings.fit_input
        found = weighted_moments(self._measuring.reading, tokens, fit_input, self._listener, self._parts)
        return {index: as_layer(self._solve(index, moments)) for index, moments in found}
