"""Operators as data: linear operators and how they store weights, fused attention, and what has a known dtype.

Exporters and optimizers use different operators for the same thing. The rest of this package uses these tables
and knows no exporter. Input and output indices are those of the operator specifications:
onnx.ai/onnx/operators and onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class LinearOp:
    """y = x · weight (+ bias): x is input 0, ``weight`` and ``bias`` are the indices of the other inputs."""

    weight: int = 1
    bias: int | None = None


@dataclass(frozen=True)
class Routed:
    """The matrices of experts that a node multiplies by: ``share`` of all ``parameters`` for each token."""

    parameters: int
    bytes: int
    share: float


@dataclass(frozen=True)
class FusedOp:
    """Attention in one node: the indices of its past inputs and present outputs, (key, value) each.

    ``new`` are the inputs with new keys and values, ``weights`` is the input with the weights of a fused
    projection. ``ragged`` operators take the length of each row and need padding on the right.
    """

    past: tuple[int, int] | None = None
    present: tuple[int, int] = (1, 2)
    new: tuple[int, int] = (1, 2)
    weights: int | None = None
    ragged: bool = False


LINEAR = {
    ("", "MatMul"): LinearOp(),
    ("", "Gemm"): LinearOp(bias=2),
    ("", "MatMulInteger"): LinearOp(),
    (MICROSOFT, "FusedMatMul"): LinearOp(),
    (MICROSOFT, "MatMulNBits"): LinearOp(bias=5),
    (MICROSOFT, "MatMulBnb4"): LinearOp(),
    (MICROSOFT, "DynamicQuantizeMatMul"): LinearOp(bias=4),
}
# Integer matrix products: x is quantized at run time (DynamicQuantizeLinear), and a Mul rescales the result.
INTEGER_PRODUCTS = frozenset({"MatMulInteger"})
FUSED = {
    ("", "Attention"): FusedOp(past=(4, 5)),
    (MICROSOFT, "GroupQueryAttention"): FusedOp(past=(3, 4), ragged=True),
    (MICROSOFT, "SparseAttention"): FusedOp(past=(3, 4), ragged=True),
    (MICROSOFT, "MultiHeadAttention"): FusedOp(past=(6, 7)),
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): FusedOp(past=(5, 6)),
    (MICROSOFT, "Attention"): FusedOp(weights=1),
}
# Residual addition and norm in one node: inputs 0 and 1 are added; the value is the index of the bias input.
SKIP_NORMS = {
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): 3,
    (MICROSOFT, "SkipLayerNormalization"): 4,
}
# onnxruntime's kernels of these compute with packed weights as the file says, and otherwise as with float weights.
PACKED = frozenset({(MICROSOFT, "MatMulNBits")})
# Products of two activations in decomposed attention.
PRODUCTS = frozenset({"MatMul", "Einsum", "FusedMatMul"})
# Mixtures of experts in one node, and the inputs that are their stacked matrices.
MIXTURES = {(MICROSOFT, "MoE"): (2, 4, 6), (MICROSOFT, "QMoE"): (2, 5, 8)}
# These read a tensor's shape, not its values: no activation flows through them.
SHAPE_ONLY = frozenset({"Shape", "Size"})
# These return the same values with another shape or dtype.
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Identity", "Dropout", "CastLike"})
QUANTIZE = "DynamicQuantizeLinear"
# Linear operators with dynamic quantization, and the index of the input that is the weight's zero point.
DYNAMIC = {"MatMulInteger": 3, "DynamicQuantizeMatMul": 3}
# What operators write that do not write the dtype of their first input: a dtype, or that of another input by its index.
_WRITES: dict[str, ir.DataType | int] = {
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), ir.DataType.BOOL),
    **dict.fromkeys(("And", "Or", "Not", "Xor", "IsNaN", "IsInf"), ir.DataType.BOOL),
    **dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"), ir.DataType.INT64),
    "Where": 1,
    "DequantizeLinear": 1,
    "GatherBlockQuantized": 2,
    "CastLike": 1,
}
# The same of their further outputs: places, and statistics of fused norms.
_WRITES_ALSO = {
    ("TopK", 1): ir.DataType.INT64,
    **{(op, i): ir.DataType.FLOAT for _, op in SKIP_NORMS for i in (1, 2)},
}


def key(node: ir.Node) -> tuple[str, str]:
    """(domain, operator) as used in the tables."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute; ``default`` if it is missing or has another type."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else default


def int_input(node: ir.Node, index: int) -> int | None:
    """The integer that is the constant input ``index`` of ``node``; None if it is none."""
    value = node.inputs[index]
    tensor = constant_tensor(value) if value is not None else None
    return None if tensor is None else int(tensor.numpy().item())


def linear_op(node: ir.Node) -> LinearOp | None:
    """The table entry of a product with a constant weight; None for any other node."""
    op = LINEAR.get(key(node))
    return op if op and len(node.inputs) > op.weight and is_constant(node.inputs[op.weight]) else None


def upstream(value: ir.Value | None) -> Iterator[ir.Value]:
    """``value``, what it is made of, and so on: always by the first input."""
    while value is not None:
        yield value
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None


def weight_shape(node: ir.Node) -> tuple[int, int] | None:
    """[inputs, outputs] of the linear operator ``node``; None if it is unknown."""
    op = linear_op(node)
    if op is None:
        return None
    if "K" in node.attributes and "N" in node.attributes:  # packed weights have another shape
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    turned = bool(int_attribute(node, "transB"))
    for value in upstream(node.inputs[op.weight]):
        shape, maker = value.shape, value.producer()
        if shape is not None and len(shape) == 2 and all(isinstance(d, int) for d in shape):
            rows, columns = int(shape[0]), int(shape[1])  # type: ignore[arg-type]
            return (columns, rows) if turned else (rows, columns)
        turned ^= maker is not None and maker.op_type == "Transpose"
    return None


def fused_op(node: ir.Node) -> FusedOp | None:
    """The table entry of a fused attention; None for any other node."""
    return FUSED.get(key(node))


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` is a weight: an initializer, or computed from initializers and constants."""
    stack, seen = [value], set[ir.Value]()
    while stack:
        current = stack.pop()
        if current is None:
            return False
        if current in seen or current.is_initializer():
            continue
        seen.add(current)
        producer = current.producer()
        if producer is None or producer.op_type in SHAPE_ONLY:
            return False
        inputs = [v for v in producer.inputs if v is not None]
        if not inputs and producer.op_type != "Constant":
            return False
        stack.extend(inputs)
    return True


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None for what is computed, and for no numbers."""
    producer = value.producer()
    if value.const_value is not None or producer is None or producer.op_type != "Constant":
        return value.const_value
    for attribute in producer.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor()
        if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            return ir.tensor(np.array(attribute.value, dtype=np.float32))
    return None


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the values of ``value``, in no order; nodes that read only its shape do not count."""
    return [u.node for u in value.uses() if u.node.op_type not in SHAPE_ONLY]


def captured(node: ir.Node) -> list[ir.Value]:
    """The outer-scope tensors that the subgraphs of ``node`` (the branches of an If, the body of a Loop) read."""
    found: list[ir.Value] = []
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
        for graph in graphs:
            inner = {v for n in graph for v in n.outputs} | set(graph.inputs)
            inner |= set(graph.initializers.values())
            reads = [v for n in graph for v in (*n.inputs, *captured(n)) if v is not None]
            found += [v for v in (*reads, *graph.outputs) if v not in inner]
    return found


def routed(node: ir.Node) -> Routed | None:
    """What ``node`` multiplies by, if it reads the experts of a token and not all; None for any other node.

    It is a mixture in one node, a Scan over stacked experts, a Gather from them, or the product of one expert with the
    tokens that a Split by their numbers gives it.
    """
    inputs = [v if v is not None and v.is_initializer() else None for v in node.inputs]
    stacks = [v for v in inputs if v is not None and len(v.shape or ()) > 2]
    bits, experts, k = 8, 0, None
    if (places := MIXTURES.get(key(node))) is not None:
        stacks = [v for i, v in enumerate(inputs) if v is not None and i in places]
        bits = int_attribute(node, "expert_weight_bits", 4) if node.op_type == "QMoE" else 8
        k = int_attribute(node, "k", 1)
    elif stacks and (node.op_type == "Scan" or (node.op_type == "Gather" and inputs[0] in stacks)):
        k = _taken(node)
    elif linear_op(node) is not None and (split := _split_before(node)) is not None:
        stacks, experts, k = [v for v in inputs[1:2] if v is not None], len(split.outputs), _taken(split)
        bits = weight_bits(node) or 8
    tensors = [v.const_value for v in stacks if v.const_value is not None]
    if not tensors or k is None:
        return None
    stored = sum(v.const_value.nbytes for v in inputs if v is not None and v.const_value is not None)
    parameters = sum(tensor.size for tensor in tensors) * 8 // bits
    return Routed(parameters, stored, k / (experts or int(tensors[0].shape.numpy()[0])))


def _split_before(product: ir.Node) -> ir.Node | None:
    """The Split by computed numbers whose part ``product`` reads, with other products and gates in between."""
    for value in upstream(product.inputs[0]):
        node = value.producer()
        if (
            node is not None
            and node.op_type == "Split"
            and len(node.inputs) > 1
            and not is_constant(node.inputs[1])
        ):
            return node
    return None


def _taken(node: ir.Node) -> int | None:
    """How many the nearest TopK before ``node`` takes."""
    router = nearest(node, lambda maker: maker.op_type == "TopK")
    return None if router is None else int_input(router, 1)


def nearest(node: ir.Node, wanted: Callable[[ir.Node], bool]) -> ir.Node | None:
    """The node before ``node`` that is ``wanted``, with the fewest nodes in between."""
    level, seen = [node], {node}
    while level:
        makers = (v.producer() for one in level for v in one.inputs if v is not None)
        level = [maker for maker in dict.fromkeys(makers) if maker is not None and maker not in seen]
        seen.update(level)
        if (found := next(filter(wanted, level), None)) is not None:
            return found
    return None


def remove_unused(model: ir.Model) -> None:
    """Remove the nodes and initializers that no output depends on."""
    while True:
        before = set(model.graph)
        RemoveUnusedNodesPass()(model)
        # onnx_ir leaves what the subgraphs of a node read in use when the node is gone.
        gone = [inner for node in before - set(model.graph) for inner in _within(node)]
        for inner in gone:
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
        if not gone:
            return


def _within(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the subgraphs of ``node``."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def scans_weights(node: ir.Node) -> bool:
    """Whether ``node`` is a Scan over weights, as those of experts, and not over what is computed."""
    return node.op_type == "Scan" and any(v is not None and v.is_initializer() for v in node.inputs)


def weight_bits(node: ir.Node) -> int:
    """Bits per weight of the linear operator ``node``; 0 if it is not quantized."""
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return int_attribute(node, "bits", 4)
    if node.op_type in DYNAMIC:
        return 8
    dequantize = dequantizer(node)
    quantized = dequantize.inputs[0] if dequantize is not None else None
    return quantized.dtype.bitwidth if quantized is not None and quantized.dtype is not None else 0


def weight_format(node: ir.Node) -> str:
    """The weight format of the linear operator ``node``, for display: ``fp32``, ``int4 in blocks of 32``."""
    if bits := weight_bits(node):
        block = int_attribute(dequantizer(node) or node, "block_size")
        return f"int{bits}" + (f" in blocks of {block}" if block else "")
    known = (value.dtype for value in upstream(node.inputs[1]) if value.dtype is not None)
    return str(next(known, "unknown")).lower()


def dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that produces the weight of ``node``, or None if there is none."""
    makers = (value.producer() for value in upstream(node.inputs[1]))
    return next(
        (maker for maker in makers if maker is not None and maker.op_type == "DequantizeLinear"), None
    )


def infer_types(model: ir.Model) -> None:
    """Set the dtype (and the shape, if ONNX infers it) of every tensor in place; an unknown dtype stays None.

    ONNX's inference stops at operators of other domains, and everything downstream is unknown.
    """
    ShapeInferencePass()(model)
    for node in model.graph:
        for index, value in enumerate(node.outputs):
            if value.dtype is None and (dtype := _dtype(node, index)) is not None:
                value.type = ir.TensorType(dtype)


def _dtype(node: ir.Node, index: int) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    written = _WRITES_ALSO.get((node.op_type, index), _WRITES.get(node.op_type, 0))
    if isinstance(written, ir.DataType):
        return written
    value = node.inputs[written] if len(node.inputs) > written else None
    return value.dtype if value is not None else None
