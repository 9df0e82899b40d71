"""nbl-export: Neural Block Linearization (arXiv 2505.21077) from PyTorch into ONNX graphs, with proof.

The verbs of the command line are functions here; see :mod:`nbl_export.api`. They are loaded when
first used, so that importing the package (and ``nbl-export --help``) stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nbl_export.api import calibrate as calibrate
    from nbl_export.api import export as export
    from nbl_export.api import inspect as inspect
    from nbl_export.api import report as report
    from nbl_export.api import rewrite as rewrite
    from nbl_export.api import run as run
    from nbl_export.api import select as select
    from nbl_export.api import verify as verify
    from nbl_export.errors import NblError as NblError
    from nbl_export.linearize.plan import Plan as Plan
    from nbl_export.pipeline import CalibrateSettings as CalibrateSettings
    from nbl_export.pipeline import SelectSettings as SelectSettings
    from nbl_export.pipeline import VerifySettings as VerifySettings
    from nbl_export.report.schema import Report as Report

_HOMES = {
    "nbl_export.api": ("calibrate", "export", "inspect", "report", "rewrite", "run", "select", "verify"),
    "nbl_export.errors": ("NblError",),
    "nbl_export.linearize.plan": ("Plan",),
    "nbl_export.pipeline": ("CalibrateSettings", "SelectSettings", "VerifySettings"),
    "nbl_export.report.schema": ("Report",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
