"""What is in a folder, and copies of it that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path


def copied(path: Path, folder: Path) -> Path:
    """The graph at ``path`` with its data, copied into ``folder``."""
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(path.with_name(name), folder / name)
    return folder / "model.onnx"


def files_in(folder: Path) -> set[str]:
    """The files below ``folder``, by their names from there."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
