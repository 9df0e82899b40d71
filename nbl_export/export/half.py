"""Write a traced graph in the requested precision; for float16 the range of every tensor is measured on real text."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.rows import Inputs
from nbl_export.export.ranges import ranges_of
from nbl_export.files import TEMPORARY
from nbl_export.graph.io import save_graph
from nbl_export.graph.precision import Precision, to_precision
from nbl_export.graph.summary import Float32Node
from nbl_export.progress import Listener, Silent, bytes_task


def save_in_precision(
    graph: ir.Model,
    path: Path,
    precision: Precision,
    rows: Sequence[NDArray[Any] | Inputs] | Inputs,
    wide: Collection[str] = ("logits",),
    readers: Sequence[Path] = (),
    listener: Listener | None = None,
) -> tuple[list[Path], list[Float32Node]]:
    """Convert the float32 ``graph`` and write it to ``path``; returns the files and the nodes that stayed float32.

    ``rows`` are token ids of real text, or embeddings with positions, or an encoder's batch; a format with the range of
    float32 does not need them. ``wide`` names the inputs and outputs that stay float32. ``readers``: see
    :func:`save_graph`.
    """
    listener, ranges = listener or Silent(), {}
    if precision.largest < float("inf"):
        with bytes_task(listener, "Measuring ranges", _weight_bytes(graph)) as done:
            ranges = _ranges(graph, path, rows, done)
    float32 = to_precision(graph, precision, ranges, wide)
    with bytes_task(listener, "Writing the graph", _weight_bytes(graph)) as done:
        files = save_graph(graph, path, progress=done, readers=readers)
    return files, float32


def _weight_bytes(graph: ir.Model) -> int:
    weights = (value.const_value for value in graph.graph.initializers.values())
    return sum(weight.nbytes for weight in weights if weight is not None)


def _ranges(
    graph: ir.Model,
    path: Path,
    rows: Sequence[NDArray[Any] | Inputs] | Inputs,
    progress: Callable[[int], object],
) -> dict[str, float]:
    path.parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".fp32.", suffix=TEMPORARY, dir=path.parent))
    try:
        copy = graph.clone()
        copy.meta.update(graph.meta)
        return ranges_of(copy, rows, folder, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
