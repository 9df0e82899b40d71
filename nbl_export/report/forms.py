"""What `convert` found of the forms for other engines, as it is kept in the output folder, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbl_export.checks import Check
from nbl_export.files import read_json
from nbl_export.records import from_json
from nbl_export.report.drawing import Table, figure, mebibytes
from nbl_export.settings.converting import PRECISIONS
from nbl_export.verify.parity.figures import Parity
from nbl_export.workspace import Workspace

_STAGE = "convert"


@dataclass(frozen=True)
class Conversion:
    """The form of another engine: its file or folder in the output folder, its bytes, the layers that are linear in it,
    and what that engine computes with it against PyTorch.
    """

    file: str
    bytes: int
    layers: tuple[str, ...]
    checks: tuple[Check, ...]
    parity: Parity | None = None

    @property
    def passed(self) -> bool:
        return not any(check.status == "failed" for check in self.checks)


def stage_of(form: str, precision: str) -> str:
    """The stage that writes a form in a precision."""
    return f"{_STAGE} {form} {precision}"


def kept_conversion(ws: Workspace, form: str, precision: str) -> Conversion:
    """What the folder keeps of a form; raises :class:`.InputError` if that is damaged."""
    path = ws.conversion(form, precision)
    again = f"run `nbl-export convert {ws.root} --to {form}` again"
    return from_json(Conversion, read_json(path, "The conversion", again), str(path), again)


def conversions_in(ws: Workspace, current: bool = False) -> dict[str, Conversion]:
    """What was found of each form in the folder, by form and precision, as ``gguf fp16``; ``current``: of its plan."""
    known = ws.current if current else ws.record
    return {
        f"{form} {precision}": kept_conversion(ws, form, precision)
        for form, precisions in PRECISIONS.items()
        for precision in precisions
        if known(stage_of(form, precision))
    }


def forms_table(forms: Mapping[str, Conversion]) -> Table:
    """A row for each check of each form."""
    rows = (
        (
            name,
            one.file,
            mebibytes(one.bytes),
            figure(one.parity.worst) if one.parity else "",
            check.name,
            check.status,
            check.detail,
        )
        for name, one in forms.items()
        for check in one.checks
    )
    return Table(
        "Other engines",
        ("form", "file", "size", "max |Δlogit|", "check", "result", "detail"),
        tuple(rows),
        "The same plan in the forms of other engines, each run there against linearized PyTorch (nbl-export convert).",
    )
