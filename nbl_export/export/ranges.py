"""Write a traced graph in the requested precision; for float16 the range of every tensor is measured on real text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export.batch.rows import Inputs
from nbl_export.files import TEMPORARY
from nbl_export.graph.io import save_graph
from nbl_export.graph.precision import Precision, to_precision
from nbl_export.graph.summary import Float32Node
from nbl_export.progress import Listener, Silent, bytes_task
from nbl_export.runtime.intermediates import batch_rows, compute_tensors

_SUFFIX = ".largest"


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
    weights = (value.const_value for value in graph.graph.initializers.values())
    size = sum(weight.nbytes for weight in weights if weight is not None)
    path.parent.mkdir(exist_ok=True)
    if precision.largest < float("inf"):
        scratch = tempfile.TemporaryDirectory(
            prefix=".fp32.", suffix=TEMPORARY, dir=path.parent, ignore_cleanup_errors=True
        )
        with bytes_task(listener, "Measuring ranges", size) as done, scratch as folder:
            copy = graph.clone()
            copy.meta.update(graph.meta)
            ranges = ranges_of(copy, rows, Path(folder), done)
    float32 = to_precision(graph, precision, ranges, wide)
    with bytes_task(listener, "Writing the graph", size) as done:
        files = save_graph(graph, path, progress=done, readers=readers)
    return files, float32


def ranges_of(
    model: ir.Model,
    rows: Sequence[NDArray[Any] | Inputs] | Inputs,
    scratch: Path | None = None,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> dict[str, float]:
    """The largest magnitude of every float32 tensor of ``model``, which is changed, over a prefill of ``rows``.

    For an encoder ``rows`` is a batch by input name. Each tensor is reduced inside the graph, and the graph is run in
    parts, row by row, so memory is that of one part and what it computes of a row; ``scratch`` is a folder for the
    weights of a part that are in no file. Padding is included because it is computed too; a tensor with NaN counts as
    infinite. ``progress`` receives the bytes of the weights of each part that has run.
    """
    passes.ShapeInferencePass()(model)
    names = _reduce_all(model.graph)
    found = compute_tensors(model, names, batch_rows(model, rows), progress=progress, scratch=scratch)
    return {name.removesuffix(_SUFFIX): float(max(row[name] for row in found)) for name in names}


def _reduce_all(graph: ir.Graph) -> list[str]:
    """Add the largest magnitude of each tensor, computed where the tensor is; returns their names.

    Only reductions, which make no second tensor of that size: of the transposed head of a large model, the third
    would be gigabytes.
    """
    infinity = ir.Value(name="infinity", const_value=ir.tensor(np.float32(np.inf)))
    graph.register_initializer(infinity)
    names = []
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT or not value.name:
                continue
            high, low, squares = (
                ir.node(f"Reduce{kind}", [value], {"keepdims": 0}) for kind in ("Max", "Min", "SumSquare")
            )
            minus = ir.node("Neg", [low.outputs[0]])
            size = ir.node("Max", [high.outputs[0], minus.outputs[0]])
            # onnxruntime's ReduceMax and ReduceMin ignore NaN; a sum does not, and squares do not cancel.
            bad = ir.node("IsNaN", [squares.outputs[0]])
            largest = ir.node("Where", [bad.outputs[0], infinity, size.outputs[0]])
            names.append(f"{value.name}{_SUFFIX}")
            largest.outputs[0].name = names[-1]
            largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            graph.insert_after(node, [high, low, squares, minus, size, bad, largest])
    return names
