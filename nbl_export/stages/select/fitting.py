"""Fit the linear layers (W and b) as the settings say: of all layers to choose from, and of the chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbl_export.blocks import Block, as_json, part_of, parts_in
from nbl_export.calibrate.collect import moments_of
from nbl_export.calibrate.moments import layer_file, load_moments, save_layer
from nbl_export.checkpoint import Checkpoint
from nbl_export.linearize.fits import as_layer, sequential_fits, weighted_moments
from nbl_export.linearize.lmmse import (
    RANK_TOLERANCE,
    Covariances,
    branch_covariances,
    fit_lmmse,
    rank_within,
    ridge_by_heldout_error,
    truncate,
)
from nbl_export.linearize.plan import DROPPED, LinearLayer, Replacement, by_part
from nbl_export.linearize.repair import Distillation, Repaired, repair
from nbl_export.linearize.scores import naming
from nbl_export.progress import Listener
from nbl_export.settings import SelectSettings
from nbl_export.settings.choices import DEFAULT_RIDGE

if TYPE_CHECKING:
    from nbl_export.calibrate.moments import LayerMoments
    from nbl_export.linearize.lmmse import LinearFit
    from nbl_export.stages.select.measured import Measuring


class _LazyLayers(Mapping[Block, Replacement]):
    """A linear layer for each of ``indices``, fitted by ``make`` at its first use and then cached."""

    def __init__(self, indices: Sequence[Block], make: Callable[[Block], LinearLayer]) -> None:
        self._indices, self._make = tuple(indices), make
        self._made: dict[Block, LinearLayer] = {}

    def __getitem__(self, index: Block) -> LinearLayer:
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def __iter__(self) -> Iterator[Block]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class Fitting:
    """Fits from the moments of ``measuring``; some fits read its text again."""

    def __init__(self, measuring: Measuring, settings: SelectSettings, listener: Listener) -> None:
        self._measuring, self._settings, self._listener = measuring, settings, listener
        self._moments = measuring.moments.layers
        # Each layer that was truncated, what became of it, and the lost share.
        self._truncated: dict[Block, tuple[LinearLayer, LinearLayer, float]] = {}

    @cached_property
    def for_choosing(self) -> Mapping[Block, Replacement]:
        """What replaces every candidate: a linear layer, fitted on first use.

        A sequential fit depends on the chosen layers, so they are chosen by one-shot fits.
        """
        if self._settings.fit == "drop":
            return self.dropped
        return _LazyLayers(sorted(self._moments), self._one_shot)

    def _one_shot(self, layer: Block) -> LinearLayer:
        if self._settings.fit == "weighted":
            return self._weighted[layer]
        return as_layer(self._solve(layer, self._moments[layer]))

    @cached_property
    def dropped(self) -> dict[Block, Replacement]:
        """Every candidate dropped."""
        return dict.fromkeys(self._moments, DROPPED)

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
            exact=measuring.run.model.in_float32,
            identity=measuring.key(settings=settings.as_json(), layers=list(map(as_json, sorted(layers)))),
        )
        checkpoint = Checkpoint(measuring.run.workspace.repair_checkpoint)
        repaired = repair(task, checkpoint, self._listener)
        return replace(repaired, layers={i: repaired.layers[part] for i, part in first.items()})

    def truncated(
        self, layers: Mapping[Block, Replacement]
    ) -> tuple[dict[Block, Replacement], dict[Block, float]]:
        """``layers`` with maps truncated to the rank of the settings or, where it is to be found, each to what costs
        next to nothing; and by layer the lost share of the output's variance."""
        maps = {index: one for index, one in layers.items() if isinstance(one, LinearLayer)}
        for index, layer in maps.items():
            # Each K is timed with layers that other K's have, too.
            if index not in self._truncated or self._truncated[index][0] is not layer:
                self._truncated[index] = (layer, *self._truncate(index, layer))
        kept = {index: self._truncated[index] for index in maps}
        low = {**layers, **{i: low for i, (_, low, _) in kept.items()}}
        return low, {i: lost for i, (_, _, lost) in kept.items()}

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

    @property
    def scoring_ridge(self) -> float:
        """The ridge of the scores that do not need held-out text."""
        return DEFAULT_RIDGE if self._settings.ridge is None else self._settings.ridge

    @property
    def _parts(self) -> set[str]:
        return {part_of(block) for block in self._moments}

    @cached_property
    def _others(self) -> Mapping[Block, LayerMoments]:
        # Moments of the selection text, for the held-out error of a ridge: in files, which go when all is fitted.
        folder, text = self._measuring.scratch(), self._measuring.text.selection
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
        tokens, model = self._measuring.text.calibration, self._measuring.reading
        self._before_fits()
        found = weighted_moments(model, tokens, self._settings.fit_input, self._listener, self._parts)
        return {index: as_layer(self._solve(index, moments)) for index, moments in found}
