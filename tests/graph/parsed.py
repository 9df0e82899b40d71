"""Graphs in ONNX's textual syntax, and what is in one that was written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from nbl_export.graph.io import save_graph


def parsed(text: str, **weights: Any) -> ir.Model:
    """A graph in ONNX's textual syntax, with ``weights`` for initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()
    )
    return ir.from_proto(proto)


def written(model: ir.Model, folder: Path) -> onnx.ModelProto:
    """``model`` on disk (checker and strict shape inference pass), read back with onnx alone."""
    path = folder / "model.onnx"
    save_graph(model, path)
    return onnx.load(str(path))


def casts(proto: onnx.ModelProto) -> Counter[tuple[str, int]]:
    """How many Casts there are of each tensor to each type."""
    return Counter((n.input[0], n.attribute[0].i) for n in proto.graph.node if n.op_type == "Cast")


def weight_types(proto: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in proto.graph.initializer}
