"""The measurements of selection with the model: the losses of layers and of sets of layers on the selection text.

Each loss is saved in ``nbl/measured.json`` as soon as it is measured, under a key of everything it depends on. An
interrupted selection continues from there, and another K or an earlier setting needs no new measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.checkpoint import Checkpoint
from nbl_export.errors import InputError
from nbl_export.files import read_sealed, sha256_of_json, write_sealed
from nbl_export.linearize.figures import Loss
from nbl_export.linearize.loss import LossMeter, loss_of_plan
from nbl_export.linearize.search import LossCache, usable
from nbl_export.progress import Listener
from nbl_export.stage_record import STAGES
from nbl_export.stages.run import Run

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.text import CalibrationText
    from nbl_export.linearize.plan import Plan
    from nbl_export.settings.choices import FitInput

_FORMAT = "nbl-export/measured/1"


class Measured:
    """The model, in the fastest precision on this machine, and its text; each is loaded on first use."""

    def __init__(self, run: Run, calibrated: str, fit_input: FitInput, listener: Listener) -> None:
        self._run, self._calibrated, self._listener = run, calibrated, listener
        self.fit_input = fit_input
        self._kept = ExitStack()
        self._seeing: list[torch.nn.Module] = []

    def close(self) -> None:
        """Release the weights that were kept for many measurements."""
        self._kept.close()

    @cached_property
    def text(self) -> CalibrationText:
        from nbl_export.calibrate.text import load_text

        return load_text(self._run.workspace.text)

    @cached_property
    def dtype(self) -> str:
        from nbl_export.calibrate.moments import load_moments
        from nbl_export.models.load import fast_dtype

        model = self._run.model
        fast, moments = fast_dtype(model.device), self._run.workspace.moments
        # What the moments were collected in runs.
        known = fast == "float32" or (moments.exists() and load_moments(moments)[1].get("dtype") == fast)
        return fast if known else model.fast_dtype

    @cached_property
    def model(self) -> torch.nn.Module:
        from nbl_export.models.weights import resident, room

        model = self.seeing(self._run.model.in_dtype(self.dtype))
        self._kept.enter_context(resident(model, room(model)))
        return model

    @property
    def exact_model(self) -> torch.nn.Module:
        """The model in float32, whose weights are changed by a repair."""
        return self._run.model.in_float32

    def seeing(self, model: torch.nn.Module) -> torch.nn.Module:
        """``model``, which takes the images of the text as long as this is open."""
        from nbl_export.models.media_tokens import seeing

        if not self._run.model.task.causal:
            return model
        if self.text.media is not None and model not in self._seeing:
            self._seeing.append(model)
            self._kept.enter_context(seeing(model, self.text.media))
        return model

    @cached_property
    def meter(self) -> LossMeter:
        text = self.text
        with self._listener.task("Running the original", text.selection.size, "tokens") as task:
            return LossMeter(
                self.model,
                text.selection,
                text.selection_document,
                self.fit_input,
                task.advance,
                self._listener,
            )

    def loss_of(self, plan: Plan) -> Loss:
        """The loss of the model with ``plan`` applied, on the selection text."""
        return usable(loss_of_plan(self.meter, plan), plan.chosen, "replaced as they ship")

    @property
    def scratch(self) -> Path:
        """The folder for files without a name."""
        return self._run.workspace.nbl

    @property
    def repair_checkpoint(self) -> Checkpoint:
        return Checkpoint(self._run.workspace.repair_checkpoint)

    def key(self, **depends: Any) -> str:
        """A key of ``depends``, the calibration, how this version fits, and how and where the model is run."""
        from nbl_export.models.device import as_setting

        run = {"dtype": self.dtype, **as_setting(self._run.model.device)}
        return sha256_of_json({"calibrate": self._calibrated, **run, "version": STAGES["select"], **depends})

    def cache(self, **depends: Any) -> LossCache:
        """The losses that depend on ``depends``, the calibration, and the precision in which they are measured."""
        path, key = self._run.workspace.measured, self.key(**depends)
        everything = self._read()

        def record(losses: Mapping[str, Mapping[str, float]]) -> None:
            # Read again, since another cache of this run may have written to the file.
            write_sealed(path, {"format": _FORMAT, "losses": {**self._read(), key: dict(losses)}})

        return LossCache(everything.get(key, {}), record)

    def _read(self) -> dict[str, Any]:
        path = self._run.workspace.measured
        if not path.exists():
            return {}
        try:
            raw = read_sealed(path, "The file of measured losses", "")
            if raw["format"] != _FORMAT:
                return {}
            losses: dict[str, Any] = raw["losses"]
            for group in losses.values():
                LossCache(group, lambda _: None)
        except (InputError, KeyError, TypeError, ValueError, AttributeError):
            self._listener.note(f"{path.name} is damaged and was ignored.")
            return {}
        return losses
