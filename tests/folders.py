"""What is in a folder, and copies of it that a test may damage."""

from __future__ import annotations

from pathlib import Path


def files_in(folder: Path) -> set[str]:
    """The files below ``folder``, by their names from there."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
