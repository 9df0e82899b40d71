"""Measure, with the model, what linear layers cost on the selection text.

Each loss is saved in ``nbl/measured.json`` as soon as it is measured, under a key of everything it depends on. An
interrupted selection continues from there, and another K or an earlier setting needs no new measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nbl_export.calibrate.moments import Moments, load_moments
from nbl_export.errors import InputError
from nbl_export.files import TEMPORARY, read_sealed, sha256_of_json, write_sealed
from nbl_export.linearize.loss import LossMeter, loss_of_plan
from nbl_export.linearize.search import LossCache, usable
from nbl_export.linearize.selection import Loss
from nbl_export.progress import Listener
from nbl_export.settings import SelectSettings
from nbl_export.stage_record import STAGES
from nbl_export.stages.run import Run

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.text import CalibrationText
    from nbl_export.linearize.plan import Plan

_FORMAT = "nbl-export/measured/1"


class Measuring:
    """The moments, the text, and the model in the fastest precision here; each is loaded on first use."""

    def __init__(self, run: Run, calibrated: str, settings: SelectSettings, listener: Listener) -> None:
        self.run, self._calibrated, self.settings, self.listener = run, calibrated, settings, listener
        self._kept = ExitStack()
        self._seeing: list[torch.nn.Module] = []

    def close(self) -> None:
        """Release the weights that were kept for many measurements."""
        self._kept.close()

    def scratch(self) -> Path:
        """A folder that goes when the measurements are closed."""
        name = TemporaryDirectory(prefix=".select.", suffix=TEMPORARY, dir=self.run.workspace.nbl)
        return Path(self._kept.enter_context(name))

    @cached_property
    def _loaded(self) -> tuple[Moments, dict[str, Any]]:
        return load_moments(self.run.workspace.moments)

    @property
    def moments(self) -> Moments:
        return self._loaded[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the moments are of."""
        return self._loaded[1]

    @cached_property
    def text(self) -> CalibrationText:
        from nbl_export.calibrate.text import load_text

        return load_text(self.run.workspace.text)

    @cached_property
    def dtype(self) -> str:
        from nbl_export.models.load import fast_dtype

        fast = fast_dtype(self.run.model.device)
        # What the moments were collected in runs.
        known = fast == "float32" or self.metadata.get("dtype") == fast
        return fast if known else self.run.model.fast_dtype

    @cached_property
    def model(self) -> torch.nn.Module:
        from nbl_export.models.weights import resident, room

        model = self._with_images(self.run.model.in_dtype(self.dtype))
        self._kept.enter_context(resident(model, room(model)))
        return model

    @property
    def reading(self) -> torch.nn.Module:
        """The model in the dtype in which the moments were collected."""
        return self._with_images(self.run.model.in_dtype(self.metadata.get("dtype", "float32")))

    def _with_images(self, model: torch.nn.Module) -> torch.nn.Module:
        """``model``, which takes the images of the text as long as this is open."""
        from nbl_export.models.media_tokens import seeing

        if self.run.model.task.causal and self.text.media is not None and model not in self._seeing:
            self._seeing.append(model)
            self._kept.enter_context(seeing(model, self.text.media))
        return model

    @cached_property
    def own_meter(self) -> LossMeter:
        text, owners = self.text.selection, self.text.selection_document
        with self.listener.task("Running the original", text.size, "tokens") as task:
            return LossMeter(self.model, text, owners, self.settings.fit_input, task.advance, self.listener)

    def loss_of(self, plan: Plan) -> Loss:
        """The loss of the model with ``plan`` applied, on the selection text."""
        return usable(loss_of_plan(self.own_meter, plan), plan.chosen, "replaced as they ship")

    def key(self, **depends: Any) -> str:
        """A key of ``depends``, the calibration, how this version fits, and how and where the model is run."""
        from nbl_export.models.device import as_setting

        run = {"dtype": self.dtype, **as_setting(self.run.model.device)}
        return sha256_of_json({"calibrate": self._calibrated, **run, "version": STAGES["select"], **depends})

    def cache(self, **depends: Any) -> LossCache:
        """The losses that depend on ``depends``, the calibration, and the precision in which they are measured."""
        path, key = self.run.workspace.measured, self.key(**depends)

        def record(losses: Mapping[str, Mapping[str, float]]) -> None:
            # Read again, since another cache of this run may have written to the file.
            write_sealed(path, {"format": _FORMAT, "losses": {**self._read(), key: dict(losses)}})

        return LossCache(self._read().get(key, {}), record)

    def _read(self) -> dict[str, Any]:
        path = self.run.workspace.measured
        if not path.exists():
            return {}
        try:
            raw = read_sealed(path, "The file of measured losses", "")
            return raw["losses"] if raw["format"] == _FORMAT else {}
        except (InputError, KeyError, TypeError):
            self.listener.note(f"{path.name} is damaged and was ignored.")
            return {}
