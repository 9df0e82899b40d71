"""A check with its verdict, and how values with checks are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from nbl_export.errors import InputError
from nbl_export.files import read_json

T = TypeVar("T")
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One verdict: ``detail`` says what was measured, or why it was skipped."""

    name: str
    status: Status
    detail: str


def load_judged(kind: type[T], path: Path, what: str, schema: str, remedy: str) -> T:
    """Read a value with checks from JSON of its ``schema``; :class:`InputError` calls it ``what``."""
    raw = read_json(path, f"The {what}", remedy)
    if not isinstance(raw, dict) or raw.get("schema") != schema:
        raise InputError(f"{path} is no {what} of this version ({schema}): {remedy}.")
    raw = {k: v for k, v in raw.items() if k not in ("schema", "verdict")}
    try:
        raw["checks"] = [Check(**c) for c in raw["checks"]]
        return kind(**raw)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}.") from None
