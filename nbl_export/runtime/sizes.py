"""What a session of a graph takes on the CPU, known from its files before it is made, and whether there is room."""

from __future__ import annotations

from pathlib import Path

import psutil

from nbl_export.graph.half_emulation import needs_emulation
from nbl_export.graph.io import load_graph
from nbl_export.graph.tensors import external_files

# Of the memory that is free; the rest is for activations, and for what nobody counts.
_USABLE = 0.9


def free() -> int:
    """Bytes that can be had."""
    return psutil.virtual_memory().available


def session_bytes(path: Path) -> int:
    """Bytes of a usual session of the graph at ``path``: its files, and a packed copy, in float32 of half precision."""
    model = load_graph(path)
    size = sum(file.stat().st_size for file in [path, *external_files(model)])
    return size * (3 if needs_emulation(model) else 2)


def fit(*sizes: int) -> bool:
    """Whether sessions of these sizes find room beside each other."""
    return sum(sizes) <= _USABLE * free()
