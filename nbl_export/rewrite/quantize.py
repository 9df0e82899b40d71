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
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import F32
from nbl_export.errors import BuildError
from nbl_export.graph.integers import Blocks, pack, quantize_blocks
from nbl_export.graph.operators import DYNAMIC, MICROSOFT, dequantizer, int_attribute, key, weight_bits

# Adds an initializer: the suffix of its name, its values, their dtype; or a function of the values, and the shape.
Add = Callable[..., ir.Value]

_TYPES = {
    ir.DataType.INT4: (4, True),
    ir.DataType.UINT4: (4, False),
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT8: (8, False),
}
# The accuracy level of MatMulNBits at which it rounds its activations to 8 bits.
_INT8_ACTIVATIONS = 4
_N_BITS = (MICROSOFT, "MatMulNBits")


def _quantized(w: F32, node: ir.Node, symmetric: bool = True) -> Blocks:
    """``w`` [output, input] in the blocks of ``node``'s weight, which is quantized, or is its DequantizeLinear."""
    scales: ir.Value | None = None
    if key(node) == _N_BITS:
        scales, bits, block = (
            node.inputs[2],
            int_attribute(node, "bits", 4),
            int_attribute(node, "block_size"),
        )
        blocks = quantize_blocks(w, bits, block, symmetric=_input(node, 3) is None)
    elif node.op_type in DYNAMIC:
        zero = _input(node, DYNAMIC[node.op_type])
        each = zero is not None and zero.shape is not None and len(zero.shape) == 1 and zero.shape[0] != 1
        rows = w if each else w.reshape(1, -1)
        blocks = quantize_blocks(rows, 8, rows.shape[1], symmetric=True, positive=True)
    else:
        scales, bits = node.inputs[1], _typed(node, node.inputs[0])[0]
        block = (
            int_attribute(node, "block_size") or w.shape[1]
        )  # without blocks: one scale per output channel
        blocks = quantize_blocks(w, bits, block, symmetric, positive=True)
    dtype = (scales.dtype if scales is not None else None) or ir.DataType.FLOAT
    return replace(blocks, scales=blocks.scales.astype(dtype.numpy()).astype(np.float32))


def _typed(node: ir.Node, stored: ir.Value | None) -> tuple[int, bool]:
    """The bits of each of the numbers ``stored``, and whether they have a sign."""
    dtype = stored.dtype if stored is not None else None
    if dtype not in _TYPES:
        raise BuildError(f"{node.name} reads weights of {dtype}: quantize the graph with 4 or 8 bits.")
    return _TYPES[dtype]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def stands_for(w: F32, node: ir.Node) -> F32:
    """What the numbers mean that ``w`` [output, input] becomes in the format of ``node``, a product with a weight."""
    if not weight_bits(node):
        stored = node.inputs[1]
        dtype = (stored.dtype if stored is not None else None) or ir.DataType.FLOAT
        return w.astype(dtype.numpy()).astype(np.float32)
    if (dequantize := dequantizer(node)) is None:
        blocks = _quantized(w, node)
    else:
        bits, signed = _typed(dequantize, dequantize.inputs[0])
        zeros = _input(dequantize, 2)
        points = zeros.const_value if zeros is not None else None
        # Numbers without a sign have zero points also where the scales are symmetric, so these tell nothing.
        middle = not signed and points is not None and (points.numpy().astype(int) == 1 << (bits - 1)).all()
        blocks = _quantized(w, dequantize, zeros is None or bool(middle))
    values: F32 = blocks.values().reshape(len(w), -1)[:, : w.shape[1]]
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
    x: ir.Value,
    weight: Callable[[], F32],
    shape: tuple[int, int],
    dtype: ir.DataType,
    neighbour: ir.Node,
    add: Add,
) -> list[ir.Node]:
    """The nodes of x · weightᵀ, the last of which writes it; the weight [output, input] is stored like ``neighbour``'s.

    ``neighbour`` is a linear operator of the same graph; ``dtype`` is that of x and of the result. A plain weight of
    the ``shape`` is loaded when it is written: all layers together may exceed memory.
    """
    if key(neighbour) == _N_BITS:
        return [_n_bits(x, weight(), neighbour, add)]
    if neighbour.op_type in DYNAMIC:
        return _dynamic(x, weight(), dtype, neighbour, add)
    if (dequantize := dequantizer(neighbour)) is not None:
        return _dequantized(x, weight(), dtype, dequantize, add)
    if weight_bits(neighbour):
        raise BuildError(
            f"{neighbour.name} is a {neighbour.op_type}, and nbl-export cannot quantize weights in its format: "
            "quantize the graph with MatMulNBits or DequantizeLinear instead."
        )
    stored = add("weight", lambda: np.ascontiguousarray(weight().T), dtype, shape[::-1])
    return [ir.node("MatMul", [x, stored])]


def _n_bits(x: ir.Value, w: F32, neighbour: ir.Node, add: Add) -> ir.Node:
    bits, scales, zeros = int_attribute(neighbour, "bits", 4), neighbour.inputs[2], _input(neighbour, 3)
    assert scales is not None
    if zeros is not None and zeros.dtype not in (None, ir.DataType.UINT8):
        raise BuildError(
            f"{neighbour.name} has zero points of {zeros.dtype}: quantize the graph with packed zero points (uint8)."
        )
    blocks = _quantized(w, neighbour)

    def like(known: ir.Value, numbers: NDArray[Any]) -> NDArray[Any]:
        return numbers if known.shape is not None and len(known.shape) == 2 else numbers.reshape(-1)

    weight = add("weight_quant", pack(blocks.numbers, bits), ir.DataType.UINT8)
    args = [x, weight, add("weight_scales", like(scales, blocks.scales), scales.dtype or ir.DataType.FLOAT)]
    if zeros is not None:
        args.append(add("weight_zeros", like(zeros, pack(blocks.zeros, bits)), ir.DataType.UINT8))
    kept = {
        n: int_attribute(neighbour, n) for n in ("block_size", "accuracy_level") if n in neighbour.attributes
    }
    return ir.node(
        "MatMulNBits", args, {"K": w.shape[1], "N": w.shape[0], "bits": bits, **kept}, domain=MICROSOFT
    )


def _dequantized(x: ir.Value, w: F32, dtype: ir.DataType, neighbour: ir.Node, add: Add) -> list[ir.Node]:
    """Wᵀ [input, output] with a DequantizeLinear that has the type and granularity of the neighbour's."""
    quantized, scales, zeros = neighbour.inputs[0], neighbour.inputs[1], _input(neighbour, 2)
    assert quantized is not None and scales is not None
    bits, signed = _typed(neighbour, quantized)
    blocks, block = _quantized(w, neighbour, zeros is None), int_attribute(neighbour, "block_size")
    shift, kind = (1 << (bits - 1)) if signed else 0, scales.dtype or dtype

    # Blocks run along the input, axis 0; without blocks the scales run along the output, axis 1.
    def turned(numbers: NDArray[Any]) -> NDArray[Any]:
        return numbers.T if block else numbers[:, 0]

    numbers = blocks.numbers.reshape(len(w), -1)[:, : w.shape[1]].T.astype(np.int16) - shift
    args = [add("weight_quant", numbers, quantized.dtype), add("weight_scales", turned(blocks.scales), kind)]
    if zeros is not None or not signed:
        args.append(add("weight_zeros", turned(blocks.zeros).astype(np.int16) - shift, quantized.dtype))
    made = ir.node("DequantizeLinear", args, {"axis": 0, "block_size": block} if block else {"axis": 1})
    value = made.outputs[0]
    value.name, value.type, value.shape = (
        f"{args[0].name}.float",
        ir.TensorType(kind),
        ir.Shape(w.shape[::-1]),
    )
    return [made, ir.node("MatMul", [x, value])]


def _dynamic(x: ir.Value, w: F32, dtype: ir.DataType, neighbour: ir.Node, add: Add) -> list[ir.Node]:
    """x and Wᵀ [input, output] as 8-bit integers; W with one scale or one per output channel, like the neighbour."""
    stored = neighbour.inputs[1]
    assert stored is not None
    _, signed = _typed(neighbour, stored)
    blocks, shift = _quantized(w, neighbour), 128 if signed else 0
    numbers = (blocks.numbers.reshape(w.shape).astype(np.int16) - shift).T
    scales = blocks.scales[:, 0] if len(blocks.scales) == len(w) != 1 else blocks.scales[0, 0]
    weight = add("weight_quant", np.ascontiguousarray(numbers), stored.dtype)
    scale = add("weight_scale", np.asarray(scales), dtype)
    point = add("weight_zero", np.full(np.shape(scales), 128 - shift, dtype=np.int16), stored.dtype)
    if neighbour.op_type == "DynamicQuantizeMatMul":
        return [ir.node("DynamicQuantizeMatMul", [x, weight, scale, point], domain=MICROSOFT)]
    nodes: list[ir.Node] = []

    def emit(
        op: str, args: Sequence[ir.Value], name: str = "", outputs: int = 1, **attributes: int
    ) -> ir.Value:
        nodes.append(ir.node(op, args, attributes, num_outputs=outputs))
        for number, value in enumerate(nodes[-1].outputs if name else ()):
            value.name = f"{weight.name}.{name}{number or ''}"
        return nodes[-1].outputs[0]

    q = emit("DynamicQuantizeLinear", [x], "quantized", outputs=3)
    _, q_scale, q_zero = nodes[0].outputs
    integer = emit("MatMulInteger", [q, weight, q_zero, point], "integer")
    emit("Mul", [emit("Cast", [integer], "cast", to=int(dtype)), emit("Mul", [q_scale, scale], "scales")])
    return nodes
