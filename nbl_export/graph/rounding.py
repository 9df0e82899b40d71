"""Compute what rounding does to a graph: run half precision without half kernels, and move weights by their rounding.

    before                       after :func:`compute_in_float32`
    x ─► op ─► y  (half)         x ─► Cast f32 ─► op ─► Cast half ─► y

Every tensor has exactly the values that a runtime of that precision with float32 accumulation would compute, so parity
measured on the emulation is parity of the graph. onnxruntime's CPU provider has no bfloat16 kernels, and it runs chains
of float16 nodes in float32 without rounding in between, so its results are more accurate than a GPU's. Inputs and
outputs are float32, because NumPy has no bfloat16 arrays. The emulation is for checks only and is never exported.

:func:`nudge`: a weight was rounded to the nearest number that its format holds, by up to half a step: a variance of
step²/12. A graph in which one number of twelve is moved by a whole step, up or down by chance, has that variance once
more. How far its activations are from those of the graph itself is how far the graph's own are from the model's before
it was rounded, if it is that model. No format is converted, so the kernels and their rounding of activations stay the
same. A step is one integer of a quantized weight, and the last bit of one in half precision. Float32 weights stay.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.graph.operators import (
    MICROSOFT,
    MIXTURES,
    constant_tensor,
    infer_types,
    int_attribute,
    key,
    scans_weights,
    upstream,
)

HALF, F32 = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16), ir.DataType.FLOAT
# Operators whose output dtype is set by an attribute, whatever their inputs are.
_EXPLICIT_DTYPE = {"Cast", "Constant", "ConstantOfShape"}
# The reason reported when such a graph is not timed.
UNTIMED = (
    "onnxruntime's CPU provider does not compute in half precision, so its times would not be meaningful"
)
# The inputs with the quantized numbers. Those of bytes without a type of their own have the bits of an attribute.
QUANTIZED_INPUTS = {
    (MICROSOFT, "MatMulNBits"): (1,),
    (MICROSOFT, "QMoE"): MIXTURES[MICROSOFT, "QMoE"],
    (MICROSOFT, "GatherBlockQuantized"): (0,),
    (MICROSOFT, "DynamicQuantizeMatMul"): (1,),
    ("", "MatMulInteger"): (1,),
    ("", "DequantizeLinear"): (0,),
}
_BITS = {"MatMulNBits": "bits", "GatherBlockQuantized": "bits", "QMoE": "expert_weight_bits"}
_RANGES = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
}
_MOVED = 1 / 12
_PART = 1 << 20  # numbers that are moved at a time: what is drawn for each takes several times its bytes


def needs_emulation(model: ir.Model) -> bool:
    """Whether any input, weight or activation of the graph is float16 or bfloat16."""
    graph = model.graph
    values = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    return any(v.dtype in HALF for v in values)


def float32_name(name: str) -> str:
    """The name of the float32 tensor with the rounded values of the half-precision tensor ``name``."""
    return f"{name}.f32"


def cast(value: ir.Value, dtype: ir.DataType | None, name: str) -> ir.Node:
    """A Cast of ``value``, which is in no graph yet; it and its output are called ``name``."""
    assert dtype is not None
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    node.outputs[0].shape = value.shape
    return node


def compute_in_float32(model: ir.Model) -> None:
    """Insert the Casts, in place."""
    infer_types(model)
    graph = model.graph
    wide: dict[ir.Value | None, ir.Value] = {}
    originals, outputs = list(graph), list(graph.outputs)
    first = originals[0]

    def widened(half: ir.Value, name: str) -> ir.Node:
        """The Cast of ``half`` to the float32 tensor that stands for ``name``."""
        return cast(half, F32, float32_name(name))

    for entry in [v for v in graph.inputs if v.dtype in HALF]:
        # Round the input: it may have more digits than the half-precision format.
        half, name = entry.dtype, str(entry.name)
        entry.type = ir.TensorType(F32)  # a new type: a clone of the graph shares its own with this one
        narrow = cast(entry, half, f"{name}.rounded")
        again = widened(narrow.outputs[0], name)
        first.prepend([narrow, again])
        wide[entry] = again.outputs[0]
    for node in originals:
        table = node.inputs[0] if node.op_type == "Gather" else None
        # An embedding lookup computes nothing, and a float32 table would be twice as large.
        looks_up = table is not None and table.is_initializer()
        for index, value in enumerate(node.inputs):
            # Nor does a Scan over weights, whose body computes in float32.
            if value is None or (index == 0 and looks_up) or (scans_weights(node) and value.is_initializer()):
                continue
            if value.dtype in HALF and value not in wide:  # a weight
                made = widened(value, str(value.name))
                first.prepend(made)
                wide[value] = made.outputs[0]
            if value in wide:
                node.replace_input_with(index, wide[value])
        for value in [v for v in node.outputs if v.dtype in HALF]:
            nodes, half, name = [], value.dtype, str(value.name)
            if node.op_type not in _EXPLICIT_DTYPE and not looks_up:
                value.type = ir.TensorType(F32)
                nodes.append(cast(value, half, f"{name}.rounded"))
            nodes.append(widened(nodes[0].outputs[0] if nodes else value, name))
            node.append(nodes)
            wide[value] = nodes[-1].outputs[0]
    for index, value in enumerate(outputs):
        if value in wide:
            result = wide[value]
            result.name, value.name = value.name, f"{value.name}.exact"
            graph.outputs[index] = result
    graph.sort()


def nudge(model: ir.Model, seed: int = 0) -> None:
    """Move the numbers of the weights, in place; each tensor is computed when it is read."""
    bits = _quantized(model)
    constants = [v for node in model.graph if node.op_type == "Constant" for v in node.outputs]
    for value in (*model.graph.initializers.values(), *constants):
        tensor, node = constant_tensor(value), value.producer()
        if tensor is None or not (value in bits or (tensor.dtype in HALF and tensor.size > 1)):
            continue
        moved = _lazy(str(value.name), tensor, bits.get(value, 0), seed)
        if node is None:
            value.const_value = moved
        else:
            node.attributes["value"] = ir.AttrTensor("value", moved)


def nudged_values(
    array: NDArray[np.float32], dtype: ir.DataType | None, seed: int | list[int]
) -> NDArray[np.float32]:
    """Activations that are fed to a tensor of ``dtype``: rounded to half precision and moved; otherwise as they are."""
    if dtype is None or dtype not in HALF:
        return array
    return _moved(array.astype(dtype.numpy()), None, np.random.default_rng(seed)).astype(np.float32)


def _quantized(model: ir.Model) -> dict[ir.Value, int]:
    """Constants with quantized weights, and the bits of each number in their bytes; 0 for typed numbers."""
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        for index in QUANTIZED_INPUTS.get(key(node), ()):
            # Behind a Reshape or a Transpose of a shared weight.
            behind = upstream(node.inputs[index]) if index < len(node.inputs) else ()
            tensors = ((value, tensor) for value in behind if (tensor := constant_tensor(value)) is not None)
            value, tensor = next(tensors, (None, None))
            if value is not None and tensor is not None and tensor.dtype in _RANGES:
                packed = node.op_type in _BITS and tensor.dtype == ir.DataType.UINT8
                found[value] = int_attribute(node, _BITS[node.op_type], 4) if packed else 0
    return found


def _lazy(name: str, tensor: ir.TensorProtocol, bits: int, seed: int) -> ir.LazyTensor:
    dtype = tensor.dtype

    def compute() -> ir.TensorProtocol:
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        array = tensor.numpy()
        if not bits:
            moved = _moved(array, _RANGES.get(dtype), generator)
        else:  # bytes of several numbers each, the first in the lowest bits
            most = (1 << bits) - 1
            moved = np.zeros_like(array)
            for shift in range(0, 8, bits):
                moved |= _moved((array >> shift) & most, (0, most), generator) << np.uint8(shift)
        return ir.tensor(moved.astype(dtype.numpy(), copy=False), dtype=dtype, name=name)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _moved(
    array: NDArray[Any], bounds: tuple[int, int] | None, generator: np.random.Generator
) -> NDArray[Any]:
    """Integers moved by -1, 0 or 1 within ``bounds``; without, halves moved to the next number.

    Zeros, and the largest numbers in half precision, stay. A generator that draws in parts draws the same numbers.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    changed = np.empty_like(flat)
    for start in range(0, len(flat), _PART):
        part = flat[start : start + _PART]
        chance = generator.random(part.shape, dtype=np.float32)
        steps = (chance < _MOVED / 2).astype(np.int16) - (chance > 1 - _MOVED / 2).astype(np.int16)
        if bounds:
            moved = np.clip(part.astype(np.int16) + steps, *bounds)
        else:
            moved = (part.view(np.int16) + steps).view(part.dtype)
            stays = (part == 0) | ~np.isfinite(moved.astype(np.float32)) | (moved == 0)
            moved = np.where(stays, part, moved)
        changed[start : start + _PART] = moved
    return changed.reshape(array.shape)
