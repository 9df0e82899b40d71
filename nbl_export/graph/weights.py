"""How a graph stores the weights of its linear operators."""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.graph.operators import MICROSOFT, int_attribute, key

# Linear operators with dynamic quantization, and the index of the input that is the weight's zero point.
DYNAMIC = {"MatMulInteger": 3, "DynamicQuantizeMatMul": 3}


def weight_bits(node: ir.Node) -> int:
    """Bits per weight of the linear operator ``node``; 0 if it is not quantized."""
    if key(node) == (MICROSOFT, "MatMulNBits"):
        return int_attribute(node, "bits", 4)
    if node.op_type == "MatMulBnb4":
        return 4
    if node.op_type in DYNAMIC:
        return 8
    dequantize = dequantizer(node)
    quantized = dequantize.inputs[0] if dequantize is not None else None
    return quantized.dtype.bitwidth if quantized is not None and quantized.dtype is not None else 0


def weight_format(node: ir.Node) -> str:
    """The weight format of the linear operator ``node``, for display: ``fp32``, ``int4 in blocks of 32``."""
    bits = weight_bits(node)
    if not bits:
        value = node.inputs[1]
        while value is not None and value.dtype is None and (made := value.producer()) is not None:
            value = made.inputs[0] if made.inputs else None
        return str(value.dtype).lower() if value is not None and value.dtype is not None else "unknown"
    maker = dequantizer(node) or node
    block = int_attribute(maker, "block_size")
    return f"int{bits}" + (f" in blocks of {block}" if block else "")


def dequantizer(neighbour: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that produces the neighbour's weight, or None if there is none."""
    value = neighbour.inputs[1]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return node
        value = node.inputs[0] if node.inputs else None
    return None
