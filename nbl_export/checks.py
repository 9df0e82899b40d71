"""A check with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One verdict: ``detail`` says what was measured, or why it was skipped.

    ``seconds`` is how long that took, when it was measured; None where no clock ran, or where another check of the same
    measurement has them.
    """

    name: str
    status: Status
    detail: str
    seconds: float | None = None
