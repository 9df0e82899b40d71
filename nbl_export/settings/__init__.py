"""What a user can ask, each setting once: on the command line, in ``nbl-export.toml``, or of the Python API."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import read_table
from nbl_export.settings.definition import Setting, Settings, Task, settings_of
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
    "NAME",
    "NO_BOUND",
    "NO_BUDGET",
    "TABLES",
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
    "read_settings",
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


# nbl-export.toml ------------------------------------------------------------------------------------

NAME = "nbl-export.toml"
TABLES: dict[str, type[Settings]] = {
    "calibrate": CalibrateSettings,
    "select": SelectSettings,
    "export": ExportSettings,
    "build": EngineSettings,
    "verify": VerifySettings,
    "eval": EvalSettings,
    "bench": BenchSettings,
    "generate": GenerateSettings,
    "convert": ConvertSettings,
    "diff": DiffBounds,
    "run": FolderSettings,
}


def read_settings(path: Path) -> dict[tuple[str, str], list[str]]:
    """What a file sets, by table and key, each as words of the command line, all of them checked.

    Raises :class:`InputError` for a file that cannot be read, an unknown table or key, and a value that is refused.
    """
    try:
        raw = read_table(path)
    except OSError as error:
        raise os_error_in_words(error, "reading --config") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path} is not a TOML file: {str(error).rstrip('.')}.") from None
    found = {}
    for table, values in raw.items():
        if table not in TABLES or not isinstance(values, dict):
            raise InputError(f"{path}: {_refused(table, TABLES)}; settings stand in tables, as [select].")
        settings = {one.key: one for one in settings_of(TABLES[table])}
        for key, value in values.items():
            if key not in settings:
                raise InputError(f"{path}: [{table}] {_refused(key, settings)}.")
            found[table, key] = _words(settings[key], value, f"{path}: [{table}] {key}")
    return found


def _words(one: Setting, value: Any, name: str) -> list[str]:
    """A value of a file as words of the command line; raises :class:`InputError`, beginning with ``name``."""
    if isinstance(value, bool) is not (one.kind is bool) or (isinstance(value, list) and not one.many):
        raise InputError(f"{name} is {json.dumps(value, default=str)}, which is no such value.")
    if one.kind is bool:
        return [str(value).lower()]
    words = [str(each) for each in (value if isinstance(value, list) else [value])]
    words = words if one.repeated and words else [",".join(words)]
    one.check(one.of_words(words, name), name, of_file=True)
    return words


def _refused(key: str, known: Iterable[str]) -> str:
    """Why a key, or what it is, that is not ``known`` is refused."""
    if key.replace("_", "-") == "trust-remote-code":
        return f"{key} would let a file run code: say --trust-remote-code on the command line"
    near = difflib.get_close_matches(key.lower(), known, 1, 0)[0]
    return f"{key} is unknown; the nearest known one is {near}"
