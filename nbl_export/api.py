"""The Python API: the functions that the command line calls::

    from nbl_export import api
    report = api.run("path/to/model", "out", api.SelectSettings(k=8))
    assert report.passed

Each works on an output folder, holds its lock, keeps what is already done there with the same
settings, and raises :class:`.NblError` with a one-sentence message for whatever the user
can put right. ``listener`` receives progress (:mod:`nbl_export.progress`); none is silent. ``trust_remote_code`` lets
code that comes with the model run; it is said at each call that loads the model, and no folder remembers it.
``rehash`` reads files again whose digests the folder has kept.

:func:`calibrate` and :func:`select` share their work with the other processes that torchrun started; the other stages
refuse to be one of several.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy  # noqa: F401, before what is built on it: that it is broken is then said of itself

from nbl_export.errors import NblError
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener
from nbl_export.ranks import check_alone
from nbl_export.report.schema import Report
from nbl_export.settings import (
    BenchSettings,
    Budget,
    CalibrateSettings,
    ConvertSettings,
    DiffBounds,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    FolderSettings,
    GenerateSettings,
    LossBound,
    SelectSettings,
    VerifySettings,
)

if TYPE_CHECKING:
    from nbl_export.doctor import doctor
    from nbl_export.report.diff import diff
    from nbl_export.rewrite.replace import RewriteResult
    from nbl_export.stages.bench import bench
    from nbl_export.stages.calibrate import calibrate
    from nbl_export.stages.convert import convert
    from nbl_export.stages.evaluate import evaluate
    from nbl_export.stages.export import export
    from nbl_export.stages.generate import generate
    from nbl_export.stages.in_order import dry_run, run
    from nbl_export.stages.inspection import inspect, report
    from nbl_export.stages.rewrite import build, rewrite
    from nbl_export.stages.select import select
    from nbl_export.stages.verify import package, verify, verify_package

else:
    # The module of each verb, which is imported when the verb is first asked for: most need torch.
    _VERBS = {
        "bench": "stages.bench",
        "build": "stages.rewrite",
        "calibrate": "stages.calibrate",
        "convert": "stages.convert",
        "diff": "report.diff",
        "doctor": "doctor",
        "dry_run": "stages.in_order",
        "evaluate": "stages.evaluate",
        "export": "stages.export",
        "generate": "stages.generate",
        "inspect": "stages.inspection",
        "package": "stages.verify",
        "report": "stages.inspection",
        "rewrite": "stages.rewrite",
        "run": "stages.in_order",
        "select": "stages.select",
        "verify": "stages.verify",
        "verify_package": "stages.verify",
    }

    def __getattr__(name: str) -> Any:
        if name not in _VERBS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"nbl_export.{_VERBS[name]}"), name)


__all__ = [
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
    "NblError",
    "Plan",
    "Report",
    "SelectSettings",
    "VerifySettings",
    "bench",
    "build",
    "calibrate",
    "convert",
    "diff",
    "doctor",
    "dry_run",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "package",
    "report",
    "rewrite",
    "rewrite_onnx",
    "run",
    "select",
    "verify",
    "verify_package",
]


def __dir__() -> list[str]:
    return __all__


def rewrite_onnx(
    onnx: str | Path, plan: str | Path, out: str | Path, listener: Listener | None = None
) -> RewriteResult:
    """Rewrite a decoder that somebody else exported, a file or a folder, by ``plan`` into the folder ``out``."""
    from nbl_export.rewrite.foreign import rewrite_foreign

    check_alone()
    return rewrite_foreign(Path(onnx), Path(plan), Path(out), listener)
