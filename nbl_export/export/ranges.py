"""The ranges of a float32 graph's tensors on real text, which decide whether half precision can hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export.batch.rows import Inputs
from nbl_export.graph.io import scratch_copy
from nbl_export.runtime.ort import run_outputs

_SUFFIX = ".largest"


def measure_ranges(path: Path, rows: Sequence[NDArray[Any]] | Inputs) -> Mapping[str, float]:
    """The largest magnitude of every float32 tensor of the graph at ``path`` over a prefill of ``rows``.

    For an encoder ``rows`` is a batch by input name. Each tensor is reduced inside the graph, so memory is that of
    an ordinary run. Padding is included because it is computed too; a tensor with NaN counts as infinite.
    """

    def reduce_all(model: ir.Model) -> None:
        passes.ShapeInferencePass()(model)
        graph = model.graph
        infinity = ir.Value(name="infinity", const_value=ir.tensor(np.float32(np.inf)))
        graph.register_initializer(infinity)
        for value in [v for n in graph for v in n.outputs if v.dtype == ir.DataType.FLOAT and v.name]:
            # onnxruntime's ReduceMax ignores NaN.
            bad = ir.node("IsNaN", [value])
            size = ir.node("Abs", [value])
            clean = ir.node("Where", [bad.outputs[0], infinity, size.outputs[0]])
            largest = ir.node("ReduceMax", [clean.outputs[0]], {"keepdims": 0})
            largest.outputs[0].name = f"{value.name}{_SUFFIX}"
            largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            graph.extend([bad, size, clean, largest])
            graph.outputs.append(largest.outputs[0])
            names.append(str(largest.outputs[0].name))

    names: list[str] = []
    with scratch_copy(path, reduce_all) as reduced:
        found = run_outputs(reduced, rows, names)
    return {name.removesuffix(_SUFFIX): float(value) for name, value in found.items()}
