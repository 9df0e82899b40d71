"""What is in a folder, and copies of it that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

from nbl_export.graph.io import load_graph
from nbl_export.graph.tensors import external_files


def copied(path: Path, folder: Path) -> Path:
    """The graph at ``path`` with its data, copied into ``folder``."""
    for file in (path, *external_files(load_graph(path))):
        target = folder / file.relative_to(path.parent)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    return folder / path.name


def files_in(folder: Path) -> set[str]:
    """The files below ``folder``, by their names from there."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
