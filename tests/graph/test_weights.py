"""How the weights of a linear map are stored, told of every way there is."""

from __future__ import annotations

import onnx_ir as ir
from onnx import TensorProto, helper

from nbl_export.graph.weights import weight_bits, weight_format
from tests.graph.quantized import dequantized, dynamic, graph, matrix, n_bits


def neighbour_of(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.name == "neighbour")


def test_bits_and_format_are_told() -> None:
    plain = graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="neighbour")], {"w": matrix()})
    told = [
        (plain, 0, "float"),
        (n_bits(4, 16, False, 1, None), 4, "int4 in blocks of 16"),
        (n_bits(8, 32, True, 2, None), 8, "int8 in blocks of 32"),
        (dequantized(TensorProto.UINT4, 16, True), 4, "int4 in blocks of 16"),
        (dequantized(TensorProto.INT8, None, False, turned=True), 8, "int8"),
        (dynamic("MatMulInteger", True, False), 8, "int8"),
        (dynamic("DynamicQuantizeMatMul", False, True), 8, "int8"),
    ]
    for model, bits, words in told:
        node = neighbour_of(model)
        assert (weight_bits(node), weight_format(node)) == (bits, words)
