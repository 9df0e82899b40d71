"""Run a half-precision (fp16/bf16) graph without half kernels: compute each node in float32, then round.

    before                       after
    x ─► op ─► y  (half)         x ─► Cast f32 ─► op ─► Cast half ─► y

Every tensor has exactly the values that a runtime of that precision with float32 accumulation would compute,
so parity measured on the emulation is parity of the graph. onnxruntime's CPU provider has no bfloat16
kernels, and it runs chains of float16 nodes in float32 without rounding in between, so its results are more
accurate than those of a GPU. Inputs and outputs are float32, because NumPy has no bfloat16 arrays. The
emulation is for checks only and is never exported.
"""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.graph.types import infer_types

HALF, F32 = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16), ir.DataType.FLOAT
# Operators whose output dtype is set by an attribute, whatever their inputs are.
_EXPLICIT_DTYPE = {"Cast", "Constant", "ConstantOfShape"}


# The reason reported when such a graph is not timed.
UNTIMED = (
    "onnxruntime's CPU provider does not compute in half precision, so its times would not be meaningful"
)


def needs_emulation(model: ir.Model) -> bool:
    """Whether any input, weight or activation of the graph is float16 or bfloat16."""
    graph = model.graph
    values = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    return any(v.dtype in HALF for v in values)


def float32_name(name: str) -> str:
    """The name of the float32 tensor with the rounded values of the half-precision tensor ``name``."""
    return f"{name}.f32"


def _is_lookup(node: ir.Node) -> bool:
    """Whether ``node`` is an embedding lookup: it computes nothing, and a float32 table would be twice as large."""
    return node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer()


def compute_in_float32(model: ir.Model) -> None:
    """Insert the Casts, in place."""
    infer_types(model)
    graph = model.graph
    wide: dict[ir.Value | None, ir.Value] = {}

    def cast(value: ir.Value, dtype: ir.DataType | None, name: str) -> ir.Node:
        assert dtype is not None
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
        node.outputs[0].shape = value.shape
        return node

    originals = list(graph)
    outputs = list(graph.outputs)
    first = originals[0]
    for entry in [v for v in graph.inputs if v.dtype in HALF]:
        half = entry.dtype
        # A new type: a clone of the graph shares its own with this one.
        entry.type = ir.TensorType(F32)
        # Round the input: it may have more digits than the half-precision format.
        narrow = cast(entry, half, f"{entry.name}.rounded")
        again = cast(narrow.outputs[0], F32, float32_name(str(entry.name)))
        first.prepend([narrow, again])
        wide[entry] = again.outputs[0]
    for node in originals:
        for index, value in enumerate(node.inputs):
            if index == 0 and _is_lookup(node):
                continue
            if value is not None and value.dtype in HALF and value not in wide:  # a weight
                made = cast(value, F32, float32_name(str(value.name)))
                first.prepend(made)
                wide[value] = made.outputs[0]
            if value in wide:
                node.replace_input_with(index, wide[value])
        for value in [v for v in node.outputs if v.dtype in HALF]:
            rounded, last = value, node
            if node.op_type not in _EXPLICIT_DTYPE and not _is_lookup(node):
                half = value.dtype
                value.type = ir.TensorType(F32)
                last = cast(value, half, f"{value.name}.rounded")
                node.append(last)
                rounded = last.outputs[0]
            again = cast(rounded, F32, float32_name(str(value.name)))
            last.append(again)
            wide[value] = again.outputs[0]
    for index, value in enumerate(outputs):
        if value in wide:
            result = wide[value]
            result.name, value.name = value.name, f"{value.name}.exact"
            graph.outputs[index] = result
    graph.sort()
