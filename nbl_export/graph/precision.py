"""Convert a float32 graph to half precision: the graph is strongly typed, no builder flag is needed.

    before                          after
    x ─► op ─► y   (float32)        x ─► op ─► y                    (fp16 or bf16)
                                    x ─► Cast ─► op ─► Cast ─► y    (an op that stays float32)

1. Every node that computes in float32 is converted: its weights and its outputs become half precision.
2. A node stays float32 if half precision is not enough, with a reason: :data:`SENSITIVE` operators, tensors
   outside the format's range on real text, constants that the format cannot represent, and the nodes that
   lead to cosines and sines. Its weights stay float32 too.
3. A Cast is inserted where a converted node reads a float32 tensor and vice versa, one for each tensor.
4. Logits (all outputs of an encoder) and pixels are float32; the KV cache is half precision. No other float32
   input, output or weight remains.

`RMSNormalization`, `LayerNormalization` and `Attention` read and write half precision but compute means and
softmax in float32: for the norms by ``stash_type``, for attention in every runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import PRESENT, state_pairs
from nbl_export.graph.operators import captured, linear_op, weight_bits
from nbl_export.graph.rounding import cast
from nbl_export.graph.summary import Float32Node
from nbl_export.settings import choices

F32 = ir.DataType.FLOAT
_PART = 1 << 22


@dataclass(frozen=True)
class Precision:
    """A floating-point format of a graph. ``largest`` is the largest magnitude a tensor may have in it.

    The maximum of float16 is 65,504; a quarter of it leaves a margin for text other than the measured text.
    """

    name: str
    gates: str
    dtype: ir.DataType
    numpy: Any
    largest: float
    quantized: bool = False


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", "float32", F32, np.float32, float("inf")),
        Precision("fp16", "float16", ir.DataType.FLOAT16, np.float16, 65504 / 4),
        Precision("bf16", "bfloat16", ir.DataType.BFLOAT16, ml_dtypes.bfloat16, float("inf")),
    )
}

# Graphs whose weights were quantized by the exporter; they compute in float32 or half precision.
QUANTIZED = {
    name: Precision(name, name, F32, np.float32, float("inf"), quantized=True) for name in choices.QUANTIZED
}

# Operators that lose too much in half precision: decomposed norms, softmax, angles of large positions, and the
# choice of experts, where rounding to a tie routes a token to another expert.
SENSITIVE = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow", "Sqrt", "Reciprocal"}
    | {"Softmax", "LogSoftmax", "Exp", "Log", "CumSum", "Cos", "Sin", "TopK", "Scan"}
)
# The nodes that lead to these stay float32 too: an angle is position times frequency.
_WITH_ANCESTORS = ("Cos", "Sin")


def precision_of(name: str) -> Precision:
    """The precision called ``name``; raises :class:`InputError` for an unknown one."""
    if name not in PRECISIONS:
        raise InputError(f"--precision {name!r} is unknown; choose {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def graph_precision(model: ir.Model) -> Precision:
    """The precision of a decoder graph: that of most of its linear operators, or of most bytes of its weights."""
    stored = [weight_bits(node) for node in model.graph if linear_op(node)]
    quantized = [bits for bits in stored if bits]
    if 2 * len(quantized) > len(stored):
        return QUANTIZED["int4" if max(set(quantized), key=quantized.count) <= 4 else "int8"]
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    sizes = {p.name: sum(w.nbytes for w in weights if w.dtype == p.dtype) for p in PRECISIONS.values()}
    return PRECISIONS[max(sizes, key=lambda name: sizes[name])]


def to_precision(
    model: ir.Model, precision: Precision, ranges: Mapping[str, float], wide: Collection[str] = ("logits",)
) -> list[Float32Node]:
    """Convert a float32 graph in place; returns the nodes that stayed float32.

    ``wide`` names the inputs and outputs that stay float32. ``ranges`` are the largest magnitudes of the
    tensors on real text, by name (a tensor without an entry is assumed to fit). Raises :class:`BuildError`
    for a graph with control flow, and for a KV cache that the format cannot hold. A Scan over tokens, and the state
    that it carries, stay float32: each token adds its own rounding.
    """
    if precision.dtype == F32:
        return []
    passes.ShapeInferencePass()(model)
    graph = model.graph
    if any(_is_control_flow(node) for node in graph):
        raise BuildError(
            f"A graph with control flow cannot be converted to {precision.name}: export it without, or in fp32."
        )
    wide = {*wide, *(str(v.name) for pair in state_pairs(model) for v in (pair.past, pair.present))}
    _check_cache(graph, precision, ranges, wide)
    float32 = _float32_nodes(graph, precision, ranges)
    converter = _Converter(graph, precision)
    for value in graph.inputs:
        if value.dtype == F32 and value.name not in wide:
            value.type = ir.TensorType(precision.dtype)
    for node in list(graph):
        if node in float32:
            converter.widen(node)
        elif any(v is not None and v.dtype in (F32, precision.dtype) for v in node.inputs):
            converter.narrow(node)
        # A node without floating-point inputs (a Cast of integers) writes float32, which its readers cast.
    for index, value in enumerate(list(graph.outputs)):
        wanted = F32 if value.name in wide else precision.dtype
        if value.dtype in (F32, precision.dtype) and value.dtype != wanted:
            converter.output(index, value, wanted)
    passes.RemoveUnusedNodesPass()(model)
    converter.restore_names()
    graph.sort()
    return [Float32Node(str(n.name), n.op_type, reason) for n, reason in float32.items()]


def _is_control_flow(node: ir.Node) -> bool:
    graphs = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node))
    return graphs and (node.op_type != "Scan" or bool(captured(node)))


def _check_cache(
    graph: ir.Graph, precision: Precision, ranges: Mapping[str, float], wide: Collection[str]
) -> None:
    # Any other tensor can stay float32; the cache must not.
    for value in graph.outputs:
        name, most = str(value.name), 4 * precision.largest
        if name not in wide and (reach := ranges.get(name, 0.0)) > most:
            found = PRESENT.match(name)
            what = (
                f"The {found[2]}s of attention layer {found[1]} ({name}) reach"
                if found
                else f"{name} reaches"
            )
            raise BuildError(
                f"{what} {reach:,.0f} on real text, and {precision.name} holds {most:,.0f} at most, so the KV cache "
                "would be infinite: use --precision bf16."
            )


def _attributes(node: ir.Node) -> Sequence[ir.Attr]:
    return list(node.attributes.values())


# 2 -----------------------------------------------------------------------------------------------


def _float32_nodes(graph: ir.Graph, precision: Precision, ranges: Mapping[str, float]) -> dict[ir.Node, str]:
    found: dict[ir.Node, str] = {}
    for node in graph:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == F32]
        if not values:
            continue
        if node.op_type in SENSITIVE or _truncates(node):
            found[node] = "sensitive to rounding"
        elif wide := [v for v in values if ranges.get(str(v.name), 0.0) > precision.largest]:
            found[node] = f"{wide[0].name} reaches {ranges[str(wide[0].name)]:.3g} on real text"
        elif bad := [v for v in values if not _representable(v, precision)]:
            found[node] = f"{precision.name} cannot hold the constant {bad[0].name}"
    for node in [n for n in found if n.op_type in _WITH_ANCESTORS]:
        _add_ancestors(node, found)
    for node in [n for n in found if n.op_type == "Scan"]:
        _add_ancestors(node, found, lambda producer: bool(linear_op(producer)) or producer.op_type == "Conv")
        _add_state_readers(node, found)
    return found


def _truncates(node: ir.Node) -> bool:
    """Whether the node casts floating-point values to integers, of which half precision represents few."""
    written = node.outputs[0].dtype
    return node.op_type == "Cast" and written is not None and not written.is_floating_point()


def _representable(value: ir.Value, precision: Precision) -> bool:
    """Whether the format can represent a constant: a scalar within 1 %, a larger weight within the range."""
    if not value.is_initializer() or value.const_value is None:
        return True
    whole = value.const_value.numpy()
    for part in _parts(whole):
        array = _within(whole[part], precision).astype(np.float64)
        with np.errstate(over="ignore"):
            rounded = array.astype(precision.numpy).astype(np.float64)
        if not np.isfinite(rounded).all():
            return False
        if whole.size == 1 and not np.allclose(rounded, array, rtol=0.01, atol=0):
            return False
    return True


def _parts(array: NDArray[Any]) -> Iterator[Any]:
    """Indices that cut ``array`` along its first axis into parts of a few million numbers: copies of it are small."""
    if array.size <= _PART:
        yield ...
        return
    step = max(1, _PART * len(array) // array.size)
    for at in range(0, len(array), step):
        yield slice(at, at + step)


def _within(array: NDArray[Any], precision: Precision) -> NDArray[Any]:
    """``array`` clipped to bfloat16's range: float32's extreme values, used in masks, would round to infinity."""
    if precision.largest < float("inf") or not np.isfinite(array).all():
        return array
    most = float(ml_dtypes.finfo(precision.numpy).max)
    within: NDArray[Any] = np.clip(array, -most, most)
    return within


def _add_ancestors(
    node: ir.Node, found: dict[ir.Node, str], stop: Callable[[ir.Node], bool] = lambda _producer: False
) -> None:
    """Add the float32 nodes that lead to ``node``, up to those at which to ``stop``."""
    reason, seen, stack = f"leads to {node.op_type}, which is sensitive to rounding", set[ir.Node](), [node]
    while stack:
        for value in stack.pop().inputs:
            producer = value.producer() if value is not None else None
            if value is not None and value.dtype == F32 and producer is not None and producer not in seen:
                if stop(producer):
                    continue
                seen.add(producer)
                found.setdefault(producer, reason)
                stack.append(producer)


def _add_state_readers(scan: ir.Node, found: dict[ir.Node, str]) -> None:
    """Add the nodes between the state that ``scan`` leaves and the graph output."""
    stack = [scan.outputs[0]]
    while stack:
        for usage in stack.pop().uses():
            found.setdefault(usage.node, "holds a state, which is carried from token to token")
            stack.extend(usage.node.outputs)


# 1, 3, 4 -----------------------------------------------------------------------------------------


class _Converter:
    """Casts and converted weights, created once for each tensor."""

    def __init__(self, graph: ir.Graph, precision: Precision) -> None:
        self.graph, self.precision = graph, precision
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}

    def narrow(self, node: ir.Node) -> None:
        """Make ``node`` compute in half precision."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == F32:
                node.replace_input_with(index, self._as(value, self.precision.dtype))
        for output in node.outputs:
            # The output dtype of a Cast is its attribute. Values may share one type object, so each gets its own.
            if output.dtype == F32 and node.op_type != "Cast":
                output.type = ir.TensorType(self.precision.dtype)

    def widen(self, node: ir.Node) -> None:
        """Make ``node`` compute in float32, whatever it reads."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self.precision.dtype:
                node.replace_input_with(index, self._as(value, F32))

    def output(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """Convert output ``index`` to ``dtype`` under its own name."""
        name = value.name
        value.name = f"{name}.{self.precision.name if dtype == F32 else 'fp32'}"
        cast = self._as(value, dtype)
        cast.name = name
        self.graph.outputs[index] = cast

    def restore_names(self) -> None:
        """Restore the original name of each weight that is only stored in half precision now."""
        for original, made in self._weights.items():
            if original.name not in self.graph.initializers:
                made.name = original.name

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = value, dtype
        if key not in self._made:
            weight = value.is_initializer() and value.const_value is not None
            self._made[key] = self._weight(value, dtype) if weight else self._cast(value, dtype)
        return self._made[key]

    def _weight(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None and value.shape is not None
        original, numpy = value.const_value, self.precision.numpy
        name = f"{value.name}.{self.precision.name}"

        # Converted when it is written, so that not all weights of a large model are in memory.
        def convert() -> ir.TensorProtocol:
            whole = original.numpy()
            converted = np.empty(whole.shape, numpy)
            for part in _parts(whole):
                converted[part] = _within(whole[part], self.precision).astype(numpy)
            return ir.tensor(converted, dtype=dtype, name=name)

        # onnx_ir's annotation asks for a class of its own, its code for the protocol.
        tensor = ir.LazyTensor(convert, dtype=dtype, shape=value.shape, name=name)  # type: ignore[arg-type]
        made = ir.Value(
            name=name,
            const_value=tensor,
            shape=value.shape,
            type=ir.TensorType(dtype),
        )
        self.graph.register_initializer(made)
        self._weights[value] = made
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = cast(value, dtype, f"{value.name}.as_{dtype.name.lower()}")
        producer = value.producer()
        if producer is not None:
            producer.append(node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]
