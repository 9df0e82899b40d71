"""Graphs of one product, x · W, whose weights are stored in every way there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.rewrite.quantize import pack, quantize_blocks

D = 48


MS = "com.microsoft"


def matrix(rows: int = D, columns: int = D) -> Any:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


def graph(nodes: list[Any], weights: dict[str, Any]) -> ir.Model:
    tensors = [
        value if not isinstance(value, np.ndarray) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", D])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", D])],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)],
        ir_version=10,
    )
    return ir.from_proto(proto)


def n_bits(bits: int, block: int, zeros: bool, rank: int, accuracy: int | None) -> ir.Model:
    """x ─► MatMulNBits ─► y with weights of another matrix."""
    blocks = quantize_blocks(matrix() * 3, bits, block, not zeros)
    scales = blocks.scales if rank == 2 else blocks.scales.reshape(-1)
    points = pack(blocks.zeros, bits)
    weights = {"b": pack(blocks.numbers, bits), "s": scales}
    if zeros:
        weights["z"] = points if rank == 2 else points.reshape(-1)
    attributes = {"K": D, "N": D, "bits": bits, "block_size": block}
    if accuracy is not None:
        attributes["accuracy_level"] = accuracy
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain=MS, name="neighbour", **attributes)
    return graph([node], weights)


def dequantized(dtype: int, block: int | None, zeros: bool, turned: bool = False) -> ir.Model:
    """x ─► MatMul ◄─ (Transpose ◄─) DequantizeLinear."""
    shape = [D // block, D] if block else [D]
    number = helper.make_tensor("q", dtype, [D, D], np.ones(D * D, dtype=np.int8).tolist())
    weights: dict[str, Any] = {"q": number, "s": np.full(shape, 0.5, dtype=np.float32)}
    if zeros:
        weights["z"] = helper.make_tensor("z", dtype, shape, [1] * int(np.prod(shape)))
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [helper.make_node("DequantizeLinear", list(weights), ["w"], name="dequantize", **attributes)]
    if turned:
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x", "t" if turned else "w"], ["y"], name="neighbour"))
    return graph(nodes, weights)


DYNAMIC = [
    pytest.param(op, signed, each, id=f"{op}, {'int8' if signed else 'uint8'}, {'each' if each else 'one'}")
    for op in ("MatMulInteger", "DynamicQuantizeMatMul")
    for signed in (True, False)
    for each in (False, True)
]


def dynamic(op: str, signed: bool, each: bool) -> ir.Model:
    """x ─► quantized when it is known ─► times 8-bit weights ─► y."""
    kind = np.int8 if signed else np.uint8
    shape = (D,) if each else ()
    weights = {
        "q": np.ones((D, D), kind),
        "s": np.full(shape, 0.1, np.float32),
        "z": np.full(shape, 0 if signed else 128, kind),
    }
    if op == "DynamicQuantizeMatMul":
        node = helper.make_node(op, ["x", "q", "s", "z"], ["y"], domain=MS, name="neighbour")
        return graph([node], weights)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node(op, ["xq", "q", "xz", "z"], ["i"], name="neighbour"),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    return graph(nodes, weights)
