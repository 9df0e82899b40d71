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

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import PRESENT, state_pairs
from nbl_export.graph.io import in_parts
from nbl_export.graph.nodes import late_initializer
from nbl_export.graph.operators import (
    captured,
    int_attribute,
    linear_op,
    remove_unused,
    scans_weights,
    weight_bits,
)
from nbl_export.graph.rounding import cast
from nbl_export.graph.summary import Float32Node
from nbl_export.settings import choices

F32 = ir.DataType.FLOAT
_PART = 1 << 22


@dataclass(frozen=True)
class Precision:
    """A floating-point format of a graph. ``largest`` is the largest magnitude a tensor may have in it. Weights have
    ``bits`` where these are integers.

    The maximum of float16 is 65,504; a quarter of it leaves a margin for text other than the measured text.
    """

    name: str
    gates: str
    dtype: ir.DataType = F32
    largest: float = float("inf")
    bits: int = 0


PRECISIONS = {
    "fp32": Precision("fp32", "float32"),
    "fp16": Precision("fp16", "float16", ir.DataType.FLOAT16, 65504 / 4),
    "bf16": Precision("bf16", "bfloat16", ir.DataType.BFLOAT16),
}

# Graphs whose weights are integers; they compute in float32 or half precision.
QUANTIZED = {name: Precision(name, name, bits=int(name.removeprefix("int"))) for name in choices.QUANTIZED}

# Operators that lose too much in half precision: decomposed norms, softmax, angles of large positions, and the
# choice of experts, where rounding to a tie routes a token to another expert.
SENSITIVE = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow", "Sqrt", "Reciprocal"}
    | {"Softmax", "LogSoftmax", "Exp", "Log", "CumSum", "Cos", "Sin", "TopK", "Scan"}
)


def precision_of(name: str) -> Precision:
    """The precision called ``name``; raises :class:`InputError` for an unknown one."""
    known = PRECISIONS | QUANTIZED
    if name not in known:
        raise InputError(f"--precision {name!r} is unknown; choose {', '.join(known)}.")
    return known[name]


def graph_precision(model: ir.Model) -> Precision:
    """The precision of a decoder graph: that of most of its linear operators, or of most bytes of its weights."""
    stored = [weight_bits(node) for node in model.graph if linear_op(node)]
    quantized = [bits for bits in stored if bits]
    if 2 * len(quantized) > len(stored):
        return QUANTIZED["int4" if max(set(quantized), key=quantized.count) <= 4 else "int8"]
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return max(PRECISIONS.values(), key=lambda p: sum(w.nbytes for w in weights if w.dtype == p.dtype))


def to_precision(
    model: ir.Model, precision: Precision, ranges: Mapping[str, float], wide: Collection[str] = ("logits",)
) -> list[Float32Node]:
    """Convert a float32 graph in place; returns the nodes that stayed float32.

    ``wide`` names the inputs and outputs that stay float32. ``ranges`` are the largest magnitudes of the
    tensors on real text, by name (a tensor without an entry is assumed to fit). Raises :class:`BuildError`
    for a graph with control flow, and for a KV cache that the format cannot hold. A Scan over tokens, and the state
    that it carries, stay float32: each token adds its own rounding. One over weights computes in float32 with weights
    in this format.
    """
    half = precision.dtype
    if half == F32:
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
            value.type = ir.TensorType(half)
    for node in list(graph):
        # A node without floating-point inputs (a Cast of integers) writes float32, which its readers cast.
        if scans_weights(node):
            converter.narrow(node)
        if node in float32:
            converter.convert(node, F32)
        elif any(v is not None and v.dtype in (F32, half) for v in node.inputs):
            converter.convert(node, half)
            for output in node.outputs:
                # The output dtype of a Cast is its attribute. Values may share a type object, so each gets its own.
                if output.dtype == F32 and node.op_type != "Cast":
                    output.type = ir.TensorType(half)
    for index, value in enumerate(list(graph.outputs)):
        wanted = F32 if value.name in wide else half
        if value.dtype in (F32, half) and value.dtype != wanted:
            name = value.name
            value.name = f"{name}.{precision.name if wanted == F32 else 'fp32'}"
            graph.outputs[index] = made = converter.converted(value, wanted)
            made.name = name
    remove_unused(model)
    for original, made in converter.weights.items():
        if original.name not in graph.initializers:  # stored in half precision alone: under its own name
            made.name = original.name
    graph.sort()
    return [Float32Node(str(n.name), n.op_type, reason) for n, reason in float32.items()]


def _is_control_flow(node: ir.Node) -> bool:
    kinds = {attribute.type for attribute in node.attributes.values()}
    graphs = kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    return bool(graphs) and not scans_weights(node) and (node.op_type != "Scan" or bool(captured(node)))


def _check_cache(
    graph: ir.Graph, precision: Precision, ranges: Mapping[str, float], wide: Collection[str]
) -> None:
    # Any other tensor can stay float32; the cache must not.
    most = 4 * precision.largest
    for name in (str(value.name) for value in graph.outputs if value.name not in wide):
        if (reach := ranges.get(name, 0.0)) > most:
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


# 2 -----------------------------------------------------------------------------------------------


def _float32_nodes(graph: ir.Graph, precision: Precision, ranges: Mapping[str, float]) -> dict[ir.Node, str]:
    found: dict[ir.Node, str] = {}
    for node in graph:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == F32]
        if not values:
            continue
        written = node.outputs[0].dtype
        # Half precision represents few integers.
        truncates = node.op_type == "Cast" and written is not None and not written.is_floating_point()
        if node.op_type in SENSITIVE or truncates:
            found[node] = "sensitive to rounding"
        elif wide := [v for v in values if ranges.get(str(v.name), 0.0) > precision.largest]:
            found[node] = f"{wide[0].name} reaches {ranges[str(wide[0].name)]:.3g} on real text"
        elif bad := [v for v in values if not _representable(v, precision)]:
            found[node] = f"{precision.name} cannot hold the constant {bad[0].name}"
    # What leads to these stays float32 too: an angle is position times frequency.
    for node in [n for n in found if n.op_type in ("Cos", "Sin")]:
        _add_ancestors(node, found)
    for node in [n for n in found if scans_weights(n)]:
        makers = (value.producer() for value in captured(node) if value.dtype == F32)
        found |= {
            maker: "is read within a Scan" for maker in makers if maker is not None and maker not in found
        }
    for node in [n for n in found if n.op_type == "Scan" and not scans_weights(n)]:
        _add_ancestors(node, found, lambda producer: bool(linear_op(producer)) or producer.op_type == "Conv")
        stack = [node.outputs[0]]
        for value in stack:  # which grows
            for usage in value.uses():
                found.setdefault(usage.node, "holds a state, which is carried from token to token")
                stack.extend(usage.node.outputs)
    return found


def _representable(value: ir.Value, precision: Precision) -> bool:
    """Whether the format can represent a constant: a scalar within 1 %, a larger weight within the range."""
    if not value.is_initializer() or value.const_value is None:
        return True
    for _, exact, rounded in _rounded(value.const_value.numpy(), precision):
        found = rounded.astype(np.float64)
        if not np.isfinite(found).all():
            return False
        if value.const_value.size == 1 and not np.allclose(found, exact, rtol=0.01, atol=0):
            return False
    return True


def _rounded(
    array: NDArray[np.float32], precision: Precision
) -> Iterator[tuple[slice, NDArray[Any], NDArray[Any]]]:
    """Parts of ``array`` along its first axis: where, as they are, and rounded; copies are small.

    Float32's extreme values, used in masks, would round to infinity in bfloat16: they are clipped to its range.
    """
    most = float(ml_dtypes.finfo(precision.dtype.numpy()).max)
    for where, part in in_parts(array, _PART):
        if precision.largest == float("inf") and np.isfinite(part).all():
            part = np.clip(part, -most, most)
        with np.errstate(over="ignore"):
            yield where, part, part.astype(precision.dtype.numpy())


def _add_ancestors(
    node: ir.Node, found: dict[ir.Node, str], stop: Callable[[ir.Node], bool] = lambda _producer: False
) -> None:
    """Add the float32 nodes that lead to ``node``, up to those at which to ``stop``."""
    reason, seen, stack = f"leads to {node.op_type}, which is sensitive to rounding", set[ir.Node](), [node]
    while stack:
        for value in stack.pop().inputs:
            producer = value.producer() if value is not None and value.dtype == F32 else None
            if producer is not None and producer not in seen and not stop(producer):
                seen.add(producer)
                found.setdefault(producer, reason)
                stack.append(producer)


# 1, 3, 4 -----------------------------------------------------------------------------------------


class _Converter:
    """Casts and converted weights, created once for each tensor; ``weights`` are those in half precision."""

    def __init__(self, graph: ir.Graph, precision: Precision) -> None:
        self.graph, self.precision = graph, precision
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.weights: dict[ir.Value, ir.Value] = {}

    def convert(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Make ``node`` read ``dtype``, float32 or half precision, whatever it is given."""
        narrowed = self.weights.values() if scans_weights(node) else ()
        for index, value in enumerate(node.inputs):
            if value is None or value in narrowed:
                continue
            if value.dtype in (F32, self.precision.dtype) and value.dtype != dtype:
                node.replace_input_with(index, self.converted(value, dtype))

    def narrow(self, scan: ir.Node) -> None:
        """Store the weights of ``scan`` in half precision; its body computes in float32 with each."""
        body = scan.attributes["body"].as_graph()
        carried = len(scan.inputs) - int_attribute(scan, "num_scan_inputs")
        for index, (value, inner) in enumerate(zip(scan.inputs, body.inputs, strict=True)):
            if value is None or not value.is_initializer() or value.dtype != F32 or index < carried:
                continue
            if not _representable(value, self.precision):
                continue
            inner.type = ir.TensorType(self.precision.dtype)
            wide = cast(inner, F32, f"{inner.name}.as_float")
            ir.convenience.replace_all_uses_with(inner, wide.outputs[0])
            wide.replace_input_with(0, inner)
            body.insert_before(body[0], wide)
            scan.replace_input_with(index, self.converted(value, self.precision.dtype))

    def converted(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in ``dtype``: a weight that is stored so, or a Cast."""
        if (value, dtype) not in self._made:
            weight = value.is_initializer() and value.const_value is not None
            self._made[value, dtype] = self._weight(value, dtype) if weight else self._cast(value, dtype)
        return self._made[value, dtype]

    def _weight(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        original, name = value.const_value, f"{value.name}.{self.precision.name}"
        assert original is not None and value.shape is not None

        def convert() -> NDArray[Any]:
            converted = np.empty(original.shape.numpy(), dtype.numpy())
            for where, _, rounded in _rounded(original.numpy(), self.precision):
                np.atleast_1d(converted)[where] = rounded
            return converted

        made = late_initializer(self.graph, name, value.shape.numpy(), dtype, convert)
        self.weights[value] = made
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = cast(value, dtype, f"{value.name}.as_{dtype.name.lower()}")
        producer = value.producer()
        if producer is not None:
            producer.append(node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]
