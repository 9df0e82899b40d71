"""The dtype of every tensor of a graph, including those that ONNX's own inference does not know.

ONNX's inference stops at operators of other domains, and everything downstream is unknown. A dtype is simpler
than a shape: most operators write the dtype they read, and the others define it.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

_BOOLEAN = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf"}
)
_INTEGER = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
# Operators whose output has the dtype of another input than the first, and its index.
_LIKE = {"Where": 1, "DequantizeLinear": 1, "GatherBlockQuantized": 2, "CastLike": 1}
# Statistics that fused norms write as additional outputs, always in float32.
_FLOAT_OUTPUTS = {"SkipSimplifiedLayerNormalization": (1, 2), "SkipLayerNormalization": (1, 2)}


def infer_types(model: ir.Model) -> None:
    """Set the dtype (and the shape, if ONNX infers it) of every tensor in place; an unknown dtype stays None."""
    passes.ShapeInferencePass()(model)
    for node in model.graph:
        for index, value in enumerate(node.outputs):
            if value.dtype is None and (dtype := _dtype(node, index)) is not None:
                value.type = ir.TensorType(dtype)


def _dtype(node: ir.Node, index: int) -> ir.DataType | None:
    op = node.op_type
    if op in _BOOLEAN:
        return ir.DataType.BOOL
    if op in _INTEGER or (op == "TopK" and index == 1):
        return ir.DataType.INT64
    if op == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if op in ("Constant", "ConstantOfShape") and "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    if index in _FLOAT_OUTPUTS.get(op, ()):
        return ir.DataType.FLOAT
    like = _LIKE.get(op, 0)
    value = node.inputs[like] if len(node.inputs) > like else None
    return value.dtype if value is not None else None
