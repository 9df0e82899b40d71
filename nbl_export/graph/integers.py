"""Store weights as integers: in blocks of numbers that have one scale, and one zero point unless it is symmetric.

    before                       after, in a graph that computes in float32
    MatMul(x, W), Gemm           MatMulNBits(x, B, scales)
    MoE(x, scores, experts)      QMoE(x, scores, experts, scales)

Embeddings, routers, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import F32
from nbl_export.graph.io import in_parts
from nbl_export.graph.nodes import late_initializer, put_in_place
from nbl_export.graph.operators import MICROSOFT, int_attribute, key, linear_op, nearest, remove_unused

U8 = NDArray[np.uint8]
# What onnxruntime's and onnxruntime-genai's quantizers take by default: the block, and activations of 8 bits.
BLOCK, _INT8_ACTIVATIONS = 32, 4
_PART = 1 << 22  # numbers that are quantized at a time, which takes several times their bytes


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
    """Integers [..., n] of 2, 4 or 8 bits in bytes [..., ⌈n·bits/8⌉], the first in the lowest bits."""
    each = 8 // bits
    filled = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % each)])
    shifted = filled.reshape(*filled.shape[:-1], -1, each) << (np.arange(each, dtype=np.uint8) * bits)
    # No two of them have a bit in common.
    packed: U8 = np.sum(shifted.astype(np.uint8), axis=-1, dtype=np.uint8)
    return packed


# a graph ------------------------------------------------------------------------------------------


def to_integers(model: ir.Model, bits: int) -> None:
    """Store the weights of the products and of the experts of a float32 graph in 4 or 8 ``bits``, in place.

    Symmetric, in blocks of 32 numbers of one output, which experts must have whole ones of.
    """
    graph = model.graph
    routers = {nearest(node, lambda n: linear_op(n) is not None) for node in graph if node.op_type == "TopK"}
    for node in list(graph):
        if key(node) == (MICROSOFT, "MoE"):
            _experts(graph, node, bits)
        elif node.op_type in ("MatMul", "Gemm") and node not in routers and linear_op(node) is not None:
            _product(graph, node, bits)
    remove_unused(model)
    model.opset_imports[MICROSOFT] = 1


def _product(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    weight, turned = node.inputs[1], bool(int_attribute(node, "transB"))
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type == "Transpose":
        weight, turned = maker.inputs[0], not turned
    if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
        return
    tensor, (rows, columns) = weight.const_value, weight.shape.numpy()  # type: ignore[union-attr]
    assert tensor is not None
    outputs, inputs = (rows, columns) if turned else (columns, rows)
    # With one name for each direction: a table may be read in both.
    name = f"{weight.name}.{'rows' if turned else 'columns'}"
    args = _stored(
        graph, name, (outputs, inputs), bits, lambda: tensor.numpy() if turned else tensor.numpy().T
    )
    told = {
        "K": inputs,
        "N": outputs,
        "bits": bits,
        "block_size": BLOCK,
        "accuracy_level": _INT8_ACTIVATIONS,
    }
    made = ir.node("MatMulNBits", [node.inputs[0], *args], told, domain=MICROSOFT, name=node.name)
    nodes = [made]
    if len(node.inputs) > 2:
        nodes.append(ir.node("Add", [made.outputs[0], node.inputs[2]]))
        made.outputs[0].name, made.outputs[0].dtype = f"{node.outputs[0].name}.product", ir.DataType.FLOAT
    put_in_place(node, nodes)


def _experts(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    x, scores, up, up_bias, down, down_bias = [*node.inputs, *[None] * 6][:6]
    assert up is not None and down is not None
    told = {**node.attributes, "expert_weight_bits": ir.AttrInt64("expert_weight_bits", bits)}
    told["block_size"] = ir.AttrInt64("block_size", BLOCK)
    args = [x, scores, *_stack(graph, up, bits), up_bias, *_stack(graph, down, bits), down_bias]
    put_in_place(node, [ir.Node(MICROSOFT, "QMoE", args, told.values(), num_outputs=1, name=node.name)])


def _stack(graph: ir.Graph, weight: ir.Value, bits: int) -> list[ir.Value]:
    assert weight.const_value is not None
    tensor, shape = weight.const_value, tuple(weight.const_value.shape.numpy())
    assert shape[-1] % BLOCK == 0  # onnxruntime's operator has whole blocks alone
    return _stored(graph, str(weight.name), shape, bits, lambda: tensor.numpy().reshape(-1, shape[-1]))


def _stored(
    graph: ir.Graph, name: str, shape: tuple[int, ...], bits: int, rows: Callable[[], F32]
) -> list[ir.Value]:
    """Integers and scales of a weight [..., outputs, inputs], whose ``rows`` [all outputs, inputs] are read late."""
    blocks = -(-shape[-1] // BLOCK)

    def parts() -> Iterator[Blocks]:
        for _, part in in_parts(rows(), _PART):
            yield quantize_blocks(part, bits, BLOCK, symmetric=True, positive=True)

    flat = len(shape) == 2  # MatMulNBits has [outputs, blocks, bytes of a block]
    bytes_of_block = BLOCK * bits // 8
    packed = (*shape[:-1], blocks, bytes_of_block) if flat else (*shape[:-1], blocks * bytes_of_block)
    return [
        late_initializer(
            graph,
            f"{name}.int{bits}",
            packed,
            ir.DataType.UINT8,
            lambda: np.concatenate([pack(p.numbers, bits) for p in parts()]),
        ),
        late_initializer(
            graph,
            f"{name}.int{bits}.scales",
            (*shape[:-1], blocks),
            ir.DataType.FLOAT,
            lambda: np.concatenate([p.scales for p in parts()]),
        ),
    ]
