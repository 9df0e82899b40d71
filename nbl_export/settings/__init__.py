"""What a user can ask, each setting once: on the command line, in a configuration file, or of the Python API."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace

from nbl_export.settings.definition import Settings, Task
from nbl_export.settings.graphs import ConvertSettings, EngineSettings, ExportSettings, FolderSettings
from nbl_export.settings.making import (
    NO_BOUND,
    NO_BUDGET,
    Budget,
    CalibrateSettings,
    LossBound,
    SelectSettings,
    auto_budget,
)
from nbl_export.settings.measuring import (
    BenchSettings,
    DiffBounds,
    EvalSettings,
    GenerateSettings,
    VerifySettings,
)

__all__ = [
    "NO_BOUND",
    "NO_BUDGET",
    "BenchSettings",
    "Budget",
    "CalibrateSettings",
    "ConvertSettings",
    "DiffBounds",
    "EngineSettings",
    "EvalSettings",
    "ExportSettings",
    "FolderSettings",
    "GenerateSettings",
    "LossBound",
    "RunSettings",
    "SelectSettings",
    "Settings",
    "VerifySettings",
    "auto_budget",
]


@dataclass(frozen=True)
class RunSettings:
    """All that a run is asked for; without ``engines`` no TensorRT engine is built."""

    selection: SelectSettings
    calibration: CalibrateSettings = field(default_factory=CalibrateSettings)
    verification: VerifySettings = field(default_factory=VerifySettings)
    exporting: ExportSettings = field(default_factory=ExportSettings)
    engines: EngineSettings | None = None
    folder: FolderSettings = field(default_factory=FolderSettings)

    @classmethod
    def of(
        cls,
        selection: SelectSettings | None = None,
        calibration: CalibrateSettings | None = None,
        verification: VerifySettings | None = None,
        exporting: ExportSettings | None = None,
        engines: EngineSettings | None = None,
        folder: FolderSettings | None = None,
    ) -> RunSettings:
        """With the usual settings for what is None, but for the engines, and with shared bounds."""
        return cls(
            selection or SelectSettings(),
            calibration or CalibrateSettings(),
            verification or VerifySettings(),
            exporting or ExportSettings(),
            engines,
            folder or FolderSettings(),
        ).sharing_bounds()

    def sharing_bounds(self) -> RunSettings:
        """One bound on the loss serves both: where K is to be found as a budget, and always as a gate of `verify`."""
        chosen, own = self.selection, self.verification.bound
        of = chosen.budget.of_loss
        bound = LossBound(*(b if a is None else a for a, b in zip(astuple(own), astuple(of), strict=True)))
        if chosen.k is not None or chosen.layers is not None:
            chosen = replace(chosen, budget=replace(chosen.budget, max_kl=None, max_perplexity_ratio=None))
        return replace(self, selection=chosen, verification=replace(self.verification, bound=bound))

    @property
    def parts(self) -> tuple[Settings, ...]:
        """What is asked of each stage."""
        made = (self.selection, self.calibration, self.exporting, self.verification, self.folder)
        return (*made, self.engines) if self.engines else made

    def check(self) -> None:
        """Raise :class:`.InputError` for what is refused of any model."""
        for settings in self.parts:
            settings.check()
        self.selection.check_precision(self.exporting.precision)
        if self.engines:
            self.exporting.check_tensorrt()

    def resolve(self, task: Task) -> RunSettings:
        """With all that depends on the task filled in; raises :class:`InputError` for what it cannot be asked."""
        exporting = self.exporting.resolve(task, self.engines is not None)
        selection, verification = self.selection.resolve(task), self.verification.resolve(task)
        return replace(self, exporting=exporting, selection=selection, verification=verification)
