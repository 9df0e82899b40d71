"""Fit the linear layers (W and b) as the settings say: of all layers to choose from, and of the chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbl_export.blocks import Block, as_json, part_of, parts_in
from nbl_export.linearize.plan import DROPPED, LinearLayer, Replacement, by_part
from nbl_export.progress import Listener
from nbl_export.settings import SelectSettings
from nbl_export.settings.choices import DEFAULT_RIDGE

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.moments import LayerMoments, Moments
    from nbl_export.linearize.lmmse import LinearFit
    from nbl_export.linearize.repair import Repaired
    from nbl_export.stages.select.measured import Measured


class _LazyLayers(Mapping[Block, Replacement]):
    """A linear layer for each of ``indices``, fitted by ``make`` at its first use and then cached."""

    def __init__(self, indices: Sequence[Block], make: Callable[[Block], LinearLayer]) -> None:
        self._indices, self._make = tuple(indices), make
        self._made: dict[Block, LinearLayer] = {}

    def __getitem__(self, index: Block) -> LinearLayer:
        if index not in self._indices:
            raise KeyError(index)
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def __iter__(self) -> Iterator[Block]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class Fitting:
    """Fits from ``moments``. A fit that reads the text of ``measured`` again uses the model returned by ``reading``,
    in the dtype in which the moments were collected.
    """

    def __init__(
        self,
        moments: Moments,
        measured: Measured,
        settings: SelectSettings,
        listener: Listener,
        reading: Callable[[], torch.nn.Module],
    ) -> None:
        self._moments, self._measured, self._settings, self._listener = moments, measured, settings, listener
        self._reading = reading
        # Each layer that was truncated, what became of it, and the lost share.
        self._truncated: dict[Block, tuple[LinearLayer, LinearLayer, float]] = {}

    @cached_property
    def for_choosing(self) -> Mapping[Block, Replacement]:
        """What replaces every candidate: a linear layer, fitted on first use.

        A sequential fit depends on the chosen layers, so they are chosen by one-shot fits.
        """
        if self._settings.fit == "drop":
            return self.dropped
        return _LazyLayers(sorted(self._moments.layers), self._one_shot)

    def _one_shot(self, layer: Block) -> LinearLayer:
        from nbl_export.linearize.fits import as_layer

        if self._settings.fit == "weighted":
            return self._weighted[layer]
        return as_layer(self._solve(layer, self._moments.layers[layer]))

    @cached_property
    def dropped(self) -> dict[Block, Replacement]:
        """Every candidate dropped."""
        return dict.fromkeys(self._moments.layers, DROPPED)

    def energy(self, layer: Block) -> float:
        """E‖y - μ_y‖² of a layer's output."""
        from nbl_export.linearize.lmmse import branch_covariances

        return float(branch_covariances(self._moments.layers[layer], "normed").c_vv.trace())

    def final(self, chosen: Sequence[Block]) -> dict[Block, Replacement]:
        """What replaces ``chosen`` before any repair."""
        from nbl_export.linearize.fits import sequential_fits

        if self._settings.fit != "sequential" or not chosen:
            return {i: self.for_choosing[i] for i in chosen}
        measured, tokens = self._measured, self._measured.text.calibration
        model, total = self._reading(), tokens.size * len(chosen)
        self._before_fits()
        with self._listener.task("Fitting in sequence", total, "tokens") as task:
            return {**sequential_fits(model, tokens, chosen, measured.fit_input, self._solve, task.advance)}

    def timed(self, layers: Sequence[Block]) -> Mapping[Block, Replacement]:
        """What ``layers`` are timed with: of the form that ships, whatever the values of W will be."""
        found = {i: self.for_choosing[i] for i in layers}
        return self.truncated(found)[0] if self._settings.truncates else found

    def repaired(self, layers: Mapping[Block, Replacement]) -> Repaired:
        """``layers`` after the distillation steps of the settings, and the adapters of other weights."""
        from nbl_export.linearize.lmmse import branch_covariances
        from nbl_export.linearize.repair import Distillation, repair

        measured, settings = self._measured, self._settings
        covariances = {i: branch_covariances(self._moments.layers[i], settings.fit_input) for i in layers}
        # The map of a span stands in the place of its first part.
        first = {i: parts_in(i)[0] for i in layers}
        task = Distillation(
            model=measured.model,
            replaced=by_part(layers),
            covariances={first[i]: c for i, c in covariances.items()},
            fit_input=settings.fit_input,
            tokens=measured.text.calibration,
            steps=settings.repair,
            seed=settings.seed,
            rank=settings.repair_rank,
            exact=measured.exact_model,
            identity=measured.key(settings=settings.as_json(), layers=list(map(as_json, sorted(layers)))),
        )
        repaired = repair(task, measured.repair_checkpoint, self._listener)
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
        from nbl_export.linearize.lmmse import RANK_TOLERANCE, branch_covariances, rank_within, truncate

        c = branch_covariances(self._moments.layers[index], self._settings.fit_input)
        w, b = layer.w.astype(np.float64), layer.b.astype(np.float64)
        rank = rank_within(w, b, c, RANK_TOLERANCE) if self._settings.rank is None else self._settings.rank
        if rank is None:
            return layer, 0.0
        low = truncate(w, b, c, rank)
        factors = (a.astype(np.float32) for a in (low.up, low.down, low.b))
        return LinearLayer.of_rank(*factors), low.lost

    def _solve(self, layer: Block, moments: LayerMoments) -> LinearFit:
        from nbl_export.linearize.lmmse import fit_lmmse, ridge_by_heldout_error
        from nbl_export.linearize.scores import naming

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
        return {part_of(block) for block in self._moments.layers}

    @cached_property
    def _others(self) -> Mapping[Block, LayerMoments]:
        # Moments of the selection text, for the held-out error of a ridge.
        from nbl_export.calibrate.collect import store_moments
        from nbl_export.calibrate.store import Unnamed

        found = Unnamed(self._measured.scratch)
        store_moments(
            self._reading(), self._measured.text.selection, "", found, self._listener, parts=self._parts
        )
        return found

    def _before_fits(self) -> None:
        """What fits need that are made while text goes through the model, which is not there then for other text."""
        if self._settings.ridge is None:
            _ = self._others

    @cached_property
    def _weighted(self) -> dict[Block, LinearLayer]:
        # Fitted as the text passes each layer, since the moments of all would take more memory than the layers.
        from nbl_export.linearize.fits import as_layer, weighted_moments
        from nbl_export.models.walk import segments

        measured, tokens = self._measured, self._measured.text.calibration
        model = self._reading()
        total = tokens.size * len(segments(model))
        self._before_fits()
        with self._listener.task("Weighing tokens", total, "tokens") as task:
            found = weighted_moments(model, tokens, measured.fit_input, task.advance, self._parts)
            return {index: as_layer(self._solve(index, moments)) for index, moments in found}
