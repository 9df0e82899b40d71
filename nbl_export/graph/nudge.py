"""Move the stored numbers of a graph's weights by as much as rounding has moved them: what its precision costs.

A weight was rounded to the nearest number that its format holds, by up to half a step: a variance of step²/12. A graph
in which one number of twelve is moved by a whole step, up or down by chance, has that variance once more. How far its
activations are from those of the graph itself is how far the graph's own are from the model's before it was rounded,
if it is that model. No format is converted, so the kernels and their rounding of activations stay the same.

A step is one integer of a quantized weight, and the last bit of one in half precision. Float32 weights stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.graph.half_emulation import HALF
from nbl_export.graph.operators import MICROSOFT, constant_tensor, int_attribute, key

# The input with the quantized numbers. Those of bytes without a type of their own have the bits of an attribute.
QUANTIZED_INPUT = {
    (MICROSOFT, "MatMulNBits"): 1,
    (MICROSOFT, "GatherBlockQuantized"): 0,
    (MICROSOFT, "DynamicQuantizeMatMul"): 1,
    ("", "MatMulInteger"): 1,
    ("", "DequantizeLinear"): 0,
}
_PACKED = ("MatMulNBits", "GatherBlockQuantized")
_RANGES = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
}
_MOVED = 1 / 12
_PART = 1 << 20  # numbers that are moved at a time


def nudge(model: ir.Model, seed: int = 0) -> None:
    """Move the numbers, in place; each tensor is computed when it is read."""
    bits = _quantized(model)
    constants = [v for node in model.graph if node.op_type == "Constant" for v in node.outputs]
    for value in (*model.graph.initializers.values(), *constants):
        tensor = constant_tensor(value)
        if tensor is None or not (value in bits or (tensor.dtype in HALF and tensor.size > 1)):
            continue
        moved = _lazy(str(value.name), tensor, bits.get(value, 0), seed)
        node = value.producer()
        if node is None:
            value.const_value = moved
        else:
            node.attributes["value"] = ir.AttrTensor("value", moved)


def nudged_values(
    array: NDArray[np.float32], dtype: ir.DataType | None, seed: int | list[int]
) -> NDArray[np.float32]:
    """Activations that are fed to a tensor of ``dtype``: rounded to half precision and moved; otherwise as they are."""
    if dtype not in HALF:
        return array
    assert dtype is not None
    return _moved_halves(array.astype(dtype.numpy()), np.random.default_rng(seed)).astype(np.float32)


def _quantized(model: ir.Model) -> dict[ir.Value, int]:
    """Constants with quantized weights, and the bits of each number in their bytes; 0 for typed numbers."""
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        index = QUANTIZED_INPUT.get(key(node))
        value = node.inputs[index] if index is not None and index < len(node.inputs) else None
        while value is not None and constant_tensor(value) is None:
            maker = value.producer()  # a Reshape or a Transpose of a shared weight
            value = maker.inputs[0] if maker is not None and maker.inputs else None
        tensor = None if value is None else constant_tensor(value)
        if value is not None and tensor is not None and tensor.dtype in _RANGES:
            packed = node.op_type in _PACKED and tensor.dtype == ir.DataType.UINT8
            found[value] = int_attribute(node, "bits", 4) if packed else 0
    return found


def _lazy(name: str, tensor: ir.TensorProtocol, bits: int, seed: int) -> ir.LazyTensor:
    dtype = tensor.dtype

    def compute() -> ir.TensorProtocol:
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        array = tensor.numpy()
        if dtype in HALF:
            moved = _moved_halves(array, generator)
        elif bits:
            moved = _moved_packed(array, bits, generator)
        else:
            moved = _moved(array, *_RANGES[dtype], generator)
        return ir.tensor(moved.astype(dtype.numpy(), copy=False), dtype=dtype, name=name)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _steps(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.int16]:
    """-1, 0 or 1 for each number."""
    chance = generator.random(shape, dtype=np.float32)
    return (chance < _MOVED / 2).astype(np.int16) - (chance > 1 - _MOVED / 2).astype(np.int16)


def _moved(numbers: NDArray[Any], low: int, high: int, generator: np.random.Generator) -> NDArray[Any]:
    def move(part: NDArray[Any]) -> NDArray[Any]:
        wide = part.astype(np.int16)
        moved: NDArray[Any] = np.clip(wide + _steps(wide.shape, generator), low, high)
        return moved

    return _by_parts(move, numbers)


def _moved_packed(packed: NDArray[Any], bits: int, generator: np.random.Generator) -> NDArray[Any]:
    """Bytes of several numbers each, the first in the lowest bits."""
    most = (1 << bits) - 1
    result = np.zeros_like(packed)
    for shift in range(0, 8, bits):
        result |= _moved((packed >> shift) & most, 0, most, generator) << np.uint8(shift)
    return result


def _moved_halves(array: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
    """The next number towards or away from zero; zeros, and the largest numbers, stay."""

    def move(part: NDArray[Any]) -> NDArray[Any]:
        raw = part.view(np.int16)
        moved = (raw + _steps(raw.shape, generator)).view(part.dtype)
        stays = (part == 0) | ~np.isfinite(moved.astype(np.float32)) | (moved == 0)
        result: NDArray[Any] = np.where(stays, part, moved)
        return result

    return _by_parts(move, array)


def _by_parts(change: Callable[[NDArray[Any]], NDArray[Any]], array: NDArray[Any]) -> NDArray[Any]:
    """``change`` of ``array``, a part at a time in order: what is drawn for each number takes several times its bytes.

    A generator that draws in parts draws the same numbers.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    changed = np.empty_like(flat)
    for start in range(0, len(flat), _PART):
        part = slice(start, start + _PART)
        changed[part] = change(flat[part])
    return changed.reshape(array.shape)
