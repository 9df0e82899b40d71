"""Where a run of the tests keeps what several of them would find alike, and whether the running test takes it."""

from __future__ import annotations

import os
from pathlib import Path

_folder: list[Path] = []


def keep_in(folder: Path) -> None:
    """Keep it in ``folder`` from now on."""
    folder.mkdir(exist_ok=True)
    _folder[:] = [folder]


def kept_in(but: str | tuple[str, ...]) -> Path | None:
    """The folder; None if nothing is kept, and for the tests below ``but``, which are of the finding itself."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removeprefix("tests/")
    return None if not _folder or test.startswith(but) else _folder[0]
