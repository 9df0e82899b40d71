"""Store W in the format of the graph's other weights: plain, block-quantized, or with a DequantizeLinear.

    neighbour                       linear layer
    MatMul(x, W)                    MatMul(u, Wᵀ)
    MatMulNBits(x, B, scales …)     MatMulNBits(u, B, scales …)        same bits, block size, symmetry
    MatMul(x, DequantizeLinear(q))  MatMul(u, DequantizeLinear(q))     same type, block size or axis, symmetry
    MatMulInteger(Quantize(x), q)   MatMulInteger(Quantize(u), q)      same type, one scale or one for each output
    DynamicQuantizeMatMul(x, q …)   DynamicQuantizeMatMul(u, q …)      the same in one node

A block of n values has one scale, and one zero point unless it is symmetric. Symmetric: the value of largest
magnitude becomes the most negative integer for MatMulNBits, as in onnxruntime's own quantizer; for the other
operators, where TensorRT needs positive scales, the largest integer of its sign. Asymmetric: the range of the
block, including zero, is mapped to all integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.errors import BuildError
from nbl_export.graph.operators import MICROSOFT, int_attribute, key
from nbl_export.graph.weights import DYNAMIC, dequantizer, weight_bits

U8 = NDArray[np.uint8]


class Weight(Protocol):
    """A weight [output, input] that is loaded when it is needed: all layers together may exceed memory."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __call__(self) -> F32: ...


class Initialize(Protocol):
    """Adds an initializer to the graph: the suffix of its name, its values or a function of them, and the dtype."""

    def __call__(
        self,
        name: str,
        numbers: NDArray[Any] | Callable[[], NDArray[Any]],
        dtype: ir.DataType,
        shape: tuple[int, ...] | None = None,
    ) -> ir.Value: ...


_TYPES = {
    ir.DataType.INT4: (4, True),
    ir.DataType.UINT4: (4, False),
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT8: (8, False),
}


# The accuracy level of MatMulNBits at which it rounds its activations to 8 bits.
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class Blocks:
    """Integers [rows, blocks, block size] from 0 to 2**bits - 1; scales and zero points [rows, blocks]."""

    numbers: U8
    scales: F32
    zeros: U8

    def values(self) -> F32:
        """The dequantized values."""
        shifted = self.numbers.astype(np.float32) - self.zeros[..., None]
        result: F32 = shifted * self.scales[..., None]
        return result


def quantize_blocks(w: F32, bits: int, block: int, symmetric: bool, positive: bool = False) -> Blocks:
    """Quantize ``w`` [rows, columns] in blocks of ``block`` columns, the last one padded with zeros.

    ``positive`` makes the scales of symmetric blocks positive; one of the 2**bits integers is then unused.
    """
    rows, columns = w.shape
    count = -(-columns // block)
    padded = np.zeros((rows, count * block), dtype=np.float32)
    padded[:, :columns] = w
    values = padded.reshape(rows, count, block)
    half, most = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        at = np.abs(values).argmax(axis=-1)[..., None]
        largest = np.take_along_axis(values, at, axis=-1)[..., 0]
        scales = np.abs(largest) / (half - 1) if positive else largest / -half
        zeros = np.full(scales.shape, half, dtype=np.uint8)
    else:
        low, high = (np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0))
        scales = (high - low) / most
        zeros = np.rint(-low / np.where(scales == 0, 1, scales)).astype(np.uint8)
    safe = np.where(scales == 0, 1, scales)
    numbers = np.clip(np.rint(values / safe[..., None]) + zeros[..., None], 0, most).astype(np.uint8)
    return Blocks(numbers, scales.astype(np.float32), zeros)


def pack(numbers: U8, bits: int) -> U8:
    """Integers [..., n] packed into bytes [..., ⌈n·bits/8⌉], the first in the lowest bits."""
    if bits not in (2, 4, 8):
        raise BuildError(f"Weights of {bits} bits are not supported: quantize the graph with 2, 4 or 8.")
    each = 8 // bits
    filled = np.zeros((*numbers.shape[:-1], -(-numbers.shape[-1] // each) * each), dtype=np.uint8)
    filled[..., : numbers.shape[-1]] = numbers
    shifted = filled.reshape(*filled.shape[:-1], -1, each) << (np.arange(each, dtype=np.uint8) * bits)
    # No two of them have a bit in common.
    packed: U8 = np.sum(shifted.astype(np.uint8), axis=-1, dtype=np.uint8)
    return packed


def stands_for(w: F32, node: ir.Node) -> F32:
    """What the numbers mean that ``w`` [output, input] becomes in the format of ``node``, a product with a weight."""
    if key(node) == (MICROSOFT, "MatMulNBits"):
        scales = node.inputs[2]
        symmetric = len(node.inputs) < 4 or node.inputs[3] is None
        blocks = quantize_blocks(
            w, int_attribute(node, "bits", 4), int_attribute(node, "block_size"), symmetric
        )
        return _of_blocks(blocks, scales, w.shape)
    if node.op_type in DYNAMIC:
        scale = node.inputs[DYNAMIC[node.op_type]]
        each = scale is not None and scale.shape is not None and len(scale.shape) == 1 and scale.shape[0] != 1
        rows = w if each else w.reshape(1, -1)
        return (
            quantize_blocks(rows, 8, rows.shape[1], symmetric=True, positive=True).values().reshape(w.shape)
        )
    dequantize = dequantizer(node)
    if dequantize is not None:
        quantized, scales = dequantize.inputs[0], dequantize.inputs[1]
        assert quantized is not None and quantized.dtype is not None
        bits, signed = _TYPES[quantized.dtype]
        each_block = int_attribute(dequantize, "block_size") or w.shape[1]
        # Numbers without a sign have zero points also where the scales are symmetric, so these tell nothing.
        zeros = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
        symmetric = zeros is None or (not signed and _all_equal(zeros, 1 << (bits - 1)))
        return _of_blocks(quantize_blocks(w, bits, each_block, symmetric, positive=True), scales, w.shape)
    stored = node.inputs[1]
    dtype = stored.dtype if stored is not None and stored.dtype is not None else ir.DataType.FLOAT
    return w.astype(dtype.numpy()).astype(np.float32)


def _all_equal(value: ir.Value, number: int) -> bool:
    tensor = value.const_value
    return tensor is not None and bool((tensor.numpy().astype(np.int16) == number).all())


def _of_blocks(blocks: Blocks, scales: ir.Value | None, shape: tuple[int, ...]) -> F32:
    dtype = scales.dtype if scales is not None and scales.dtype is not None else ir.DataType.FLOAT
    rounded = replace(blocks, scales=blocks.scales.astype(dtype.numpy()).astype(np.float32))
    values: F32 = rounded.values().reshape(shape[0], -1)[:, : shape[1]]
    return values


def computed(u: F32, weights: Sequence[F32], nodes: Sequence[ir.Node], b: F32, dtype: ir.DataType) -> F32:
    """u · weightsᵀ + b as ``nodes`` compute it in ``dtype``: with their rounding of activations.

    ``u`` is [tokens, d]; each of ``weights`` [output, input] belongs to the node at its place, and their products with
    u are taken in turn; ``b`` is [d]. Returns [tokens, d].
    """

    def rounded(x: F32) -> F32:
        return x.astype(dtype.numpy()).astype(np.float32)

    x = rounded(u)
    for weight, node in zip(weights, nodes, strict=True):
        x = rounded((_activations(x, node) @ weight.T).astype(np.float32))
    return rounded(x + rounded(b))


def _activations(x: F32, node: ir.Node) -> F32:
    """``x`` as ``node`` rounds it before it multiplies: to 8 bits, for each block or for the whole tensor, or not."""
    if node.op_type in DYNAMIC:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = (high - low) / 255 or 1.0
        zero = np.rint(-low / scale)
        dynamic: F32 = ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)
        return dynamic
    if int_attribute(node, "accuracy_level") == _INT8_ACTIVATIONS:
        block = quantize_blocks(x, 8, int_attribute(node, "block_size"), symmetric=True, positive=True)
        return block.values().reshape(len(x), -1)[:, : x.shape[1]]
    return x


def product(
    x: ir.Value, weight: Weight, dtype: ir.DataType, neighbour: ir.Node, initialize: Initialize
) -> list[ir.Node]:
    """The nodes of x · weightᵀ, the last of which writes it; the weight is stored like ``neighbour``'s.

    ``neighbour`` is a linear operator of the same graph; ``dtype`` is that of x and of the result.
    """
    if key(neighbour) == (MICROSOFT, "MatMulNBits"):
        return [_n_bits(x, weight(), neighbour, initialize)]
    if neighbour.op_type in DYNAMIC:
        return _dynamic(x, weight(), dtype, neighbour, initialize)
    if weight_bits(neighbour) and dequantizer(neighbour) is None:
        raise BuildError(
            f"{neighbour.name} is a {neighbour.op_type}, and nbl-export cannot quantize weights in its format: "
            "quantize the graph with MatMulNBits or DequantizeLinear instead."
        )
    dequantize = dequantizer(neighbour)
    if dequantize is not None:
        return _dequantized(x, weight(), dtype, dequantize, initialize)
    stored = initialize("weight", lambda: np.ascontiguousarray(weight().T), dtype, weight.shape[::-1])
    return [ir.node("MatMul", [x, stored])]


def _n_bits(x: ir.Value, w: F32, neighbour: ir.Node, initialize: Initialize) -> ir.Node:
    attributes = dict(neighbour.attributes)
    bits = attributes["bits"].as_int() if "bits" in attributes else 4
    block = attributes["block_size"].as_int()
    inputs = [*neighbour.inputs, None, None]
    scales, zeros = inputs[2], inputs[3]
    assert scales is not None
    if zeros is not None and zeros.dtype not in (None, ir.DataType.UINT8):
        raise BuildError(
            f"{neighbour.name} has zero points of {zeros.dtype}: quantize the graph with packed zero points (uint8)."
        )
    blocks = quantize_blocks(w, bits, block, symmetric=zeros is None)
    weight = initialize("weight_quant", pack(blocks.numbers, bits), ir.DataType.UINT8)
    shaped = blocks.scales if _rank(scales) == 2 else blocks.scales.reshape(-1)
    stored = initialize("weight_scales", shaped, scales.dtype or ir.DataType.FLOAT)
    args: list[ir.Value | None] = [x, weight, stored]
    if zeros is not None:
        packed = pack(blocks.zeros, bits)
        packed = packed if _rank(zeros) == 2 else packed.reshape(-1)
        args.append(initialize("weight_zeros", packed, ir.DataType.UINT8))
    sizes = {"K": w.shape[1], "N": w.shape[0], "bits": bits, "block_size": block}
    if "accuracy_level" in attributes:
        sizes["accuracy_level"] = attributes["accuracy_level"].as_int()
    return ir.node("MatMulNBits", args, sizes, domain=MICROSOFT)


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 1


def _dequantized(
    x: ir.Value, w: F32, dtype: ir.DataType, neighbour: ir.Node, initialize: Initialize
) -> list[ir.Node]:
    """Wᵀ [input, output] with a DequantizeLinear that has the type and granularity of the neighbour's."""
    quantized, scales = neighbour.inputs[0], neighbour.inputs[1]
    zeros = neighbour.inputs[2] if len(neighbour.inputs) > 2 else None
    assert quantized is not None and scales is not None
    if quantized.dtype not in _TYPES:
        raise BuildError(
            f"{neighbour.name} reads weights of {quantized.dtype}: quantize the graph with 4 or 8 bits."
        )
    bits, signed = _TYPES[quantized.dtype]
    block = neighbour.attributes["block_size"].as_int() if "block_size" in neighbour.attributes else 0
    columns = w.shape[1]
    each = block or columns  # without blocks: one scale per output channel
    blocks = quantize_blocks(w, bits, each, symmetric=zeros is None, positive=True)
    shift = (1 << (bits - 1)) if signed else 0
    numbers = blocks.numbers.reshape(len(w), -1)[:, :columns].T.astype(np.int16) - shift
    stored = initialize("weight_quant", numbers, quantized.dtype)
    # Blocks run along the input, axis 0; without blocks the scales run along the output, axis 1.
    shape = blocks.scales.T if block else blocks.scales[:, 0]
    args: list[ir.Value | None] = [stored, initialize("weight_scales", shape, scales.dtype or dtype)]
    if zeros is not None or not signed:
        zero = blocks.zeros.T if block else blocks.zeros[:, 0]
        args.append(initialize("weight_zeros", zero.astype(np.int16) - shift, quantized.dtype))
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    made = ir.node("DequantizeLinear", args, attributes)
    made.outputs[0].name = f"{stored.name}.float"
    made.outputs[0].type = ir.TensorType(scales.dtype or dtype)
    made.outputs[0].shape = ir.Shape([columns, len(w)])
    return [made, ir.node("MatMul", [x, made.outputs[0]])]


def _dynamic(
    x: ir.Value, w: F32, dtype: ir.DataType, neighbour: ir.Node, initialize: Initialize
) -> list[ir.Node]:
    """x and Wᵀ [input, output] as 8-bit integers; W with one scale or one per output channel, like the neighbour."""
    stored = neighbour.inputs[1]
    assert stored is not None
    if stored.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        raise BuildError(f"{neighbour.name} reads weights of {stored.dtype}: quantize the graph with 8 bits.")
    index = DYNAMIC[neighbour.op_type]
    zero = neighbour.inputs[index] if len(neighbour.inputs) > index else None
    each = zero is not None and zero.shape is not None and len(zero.shape) == 1 and zero.shape[0] != 1
    rows = w if each else w.reshape(1, -1)
    blocks = quantize_blocks(rows, 8, rows.shape[1], symmetric=True, positive=True)
    signed = stored.dtype == ir.DataType.INT8
    shift = 128 if signed else 0
    numbers = (blocks.numbers.reshape(w.shape).astype(np.int16) - shift).T
    scales = blocks.scales[:, 0] if each else blocks.scales[0, 0]
    zeros = np.full(scales.shape, 128 - shift, dtype=np.int16)
    weight = initialize("weight_quant", np.ascontiguousarray(numbers), stored.dtype)
    scale = initialize("weight_scale", np.asarray(scales), dtype)
    point = initialize("weight_zero", zeros, stored.dtype)
    if neighbour.op_type == "DynamicQuantizeMatMul":
        return [ir.node("DynamicQuantizeMatMul", [x, weight, scale, point], domain=MICROSOFT)]
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    q, q_scale, q_zero = quantize.outputs
    product = ir.node("MatMulInteger", [q, weight, q_zero, point])
    cast = ir.node("Cast", [product.outputs[0]], {"to": int(dtype)})
    both = ir.node("Mul", [q_scale, scale])
    result = ir.node("Mul", [cast.outputs[0], both.outputs[0]])
    nodes = [quantize, product, cast, both, result]
    for node, name in zip(nodes[:-1], ("quantized", "integer", "cast", "scales"), strict=True):
        for number, value in enumerate(node.outputs):
            value.name = f"{weight.name}.{name}{number or ''}"
    return nodes
