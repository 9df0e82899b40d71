"""A check with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One verdict: ``detail`` says what was measured, or why it was skipped."""

    name: str
    status: Status
    detail: str
