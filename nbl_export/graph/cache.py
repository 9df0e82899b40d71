"""Find what a decoder graph keeps from token to token: its KV cache, and states of a fixed size of other layers.

    past ─► Concat │ TensorScatter │ fused attention ─► present

Inputs and outputs are paired by name where the names follow the usual pattern. Otherwise they are paired by
structure: a pair is an input that one of these operators turns into an output. Keys and values are told apart
by the softmax: keys are multiplied before it, values after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from nbl_export.batch import SIDES, WRITE_INDICES
from nbl_export.errors import InputError
from nbl_export.files import parse_json
from nbl_export.graph.operators import PRODUCTS, VIEWS, fused_op, readers, upstream, weight_shape
from nbl_export.records import from_json

T = TypeVar("T")
PAST = re.compile(r"^past_key_values\.(\d{1,6})\.(key|value)$")
PRESENT = re.compile(r"^present\.(\d{1,6})\.(key|value)$")
# Metadata of our graphs: the model's layer index of each KV pair, and what each layer of a rewritten graph is
# (:class:`.summary.DescribedLayer`).
KV_LAYERS_KEY, LAYERS_KEY = "nbl_export.kv_layers", "nbl_export.layers"
# The maximum number of nodes between the softmax and the product with V.
_SOFTMAX_STEPS = 8


def is_static(model: ir.Model) -> bool:
    """Whether the decoder has a static cache: buffers of fixed length."""
    return any(value.name == WRITE_INDICES for value in model.graph.inputs)


def kv_layers(model: ir.Model) -> tuple[int, ...]:
    """The model's layer index of each KV pair: from the metadata, or the pair's own index without metadata."""
    pairs = kv_pairs(model)
    if KV_LAYERS_KEY not in model.metadata_props:
        return tuple(pair.index for pair in pairs)
    layers = metadata_list(model, KV_LAYERS_KEY, int)
    if len(layers) != len(pairs):
        raise InputError(
            f"The graph's metadata {KV_LAYERS_KEY} names {len(layers)} layers with a KV cache, the graph has "
            f"{len(pairs)}: export the model again."
        )
    return layers


def metadata_list(model: ir.Model, key: str, kind: type[T]) -> tuple[T, ...]:
    """A list of ``kind`` that nbl-export wrote into the metadata; empty if there is none.

    Raises :class:`InputError` for anything else under that key.
    """
    try:
        found = parse_json(model.metadata_props.get(key, "[]"))
        return tuple(from_json(tuple[kind, ...], found, key, "remove it"))  # type: ignore[valid-type]
    except (ValueError, InputError):
        raise InputError(
            f"The graph's metadata {key} was not written by nbl-export: remove that entry."
        ) from None


@dataclass(frozen=True)
class KVPair:
    """The cache of one attention layer: past (graph inputs) and present (graph outputs), each (key, value)."""

    index: int
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]

    def geometry(self, side: int = 0) -> tuple[int, int]:
        """Number of heads and head_dim of a [batch, heads, length, head_dim] cache, from its shape or its attention.

        ``side`` is 0 for keys and 1 for values; their head_dim may differ.
        """
        shape = self.past[side].shape
        heads, size = (shape[1], shape[3]) if shape is not None and len(shape) == 4 else (None, None)
        if isinstance(heads, int) and isinstance(size, int):
            return heads, size
        for usage in self.past[0].uses():
            count = usage.node.attributes.get("kv_num_heads")
            if fused_op(usage.node) and count is not None:
                return count.as_int(), _head_size(usage.node)
        raise InputError(
            f"The number of heads and the head_dim of {self.past[side].name} are unknown: give that graph input a "
            "shape with both."
        )


def _head_size(attention: ir.Node) -> int:
    """The head_dim of a GroupQueryAttention, to which onnxruntime-genai's builder gives a name: the width of its
    projections divided by the number of heads.
    """
    queries, keys = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    packed = len(attention.inputs) < 2 or attention.inputs[1] is None
    heads = queries + 2 * keys if packed else queries
    for value in upstream(attention.inputs[0]):
        last = value.shape[-1] if value.shape is not None and len(value.shape) else None
        if isinstance(last, int):
            return last // heads
        if (node := value.producer()) is not None and (known := weight_shape(node)):
            return known[1] // heads
    raise InputError(f"The head_dim of {attention.name} is unknown: run shape inference on the graph.")


def kv_pairs(model: ir.Model) -> tuple[KVPair, ...]:
    """The KV pairs of a graph in layer order; raises :class:`InputError` for an incomplete pair."""
    past, present = (
        {(int(m[1]), m[2]): v for v in values if (m := pattern.match(v.name or ""))}
        for values, pattern in ((model.graph.inputs, PAST), (model.graph.outputs, PRESENT))
    )
    if not past or not present:
        return _pairs_by_structure(model)
    pairs, (key, value) = [], SIDES
    for index in sorted({index for index, _ in past.keys() | present.keys()}):
        if any((index, side) not in found for side in SIDES for found in (past, present)):
            raise InputError(
                f"The graph's KV cache {index} is incomplete: past and present key and value are needed; export the "
                "model again."
            )
        old, new = ((found[index, key], found[index, value]) for found in (past, present))
        pairs.append(KVPair(index, old, new))
    return tuple(pairs)


def _pairs_by_structure(model: ir.Model) -> tuple[KVPair, ...]:
    order = {node: i for i, node in enumerate(model.graph)}
    sides: tuple[list[tuple[int, ir.Value, ir.Value]], ...] = ([], [])
    for past in model.graph.inputs:
        grown = _grown(past)
        if grown is None:
            continue
        node, present, side = grown
        if side is None:
            side, node = _side(present)
        sides[side].append((order[node], past, present))
    keys, values = (sorted(side, key=lambda entry: entry[0]) for side in sides)
    if len(keys) != len(values):
        raise InputError(
            f"The graph's KV cache has {len(keys)} keys and {len(values)} values, so it is incomplete: export the "
            "model again."
        )
    return tuple(
        KVPair(index, (k[1], v[1]), (k[2], v[2]))
        for index, (k, v) in enumerate(zip(keys, values, strict=True))
    )


def _grown(past: ir.Value) -> tuple[ir.Node, ir.Value, int | None] | None:
    """The node that extends the cache ``past``, the graph output, and its side if the node defines it."""
    stack = [past]
    while stack:
        value = stack.pop()
        for node in readers(value):
            op = fused_op(node)
            if op and op.past:
                for side, (old, new) in enumerate(zip(op.past, op.present, strict=True)):
                    if len(node.inputs) > old and node.inputs[old] is value and len(node.outputs) > new:
                        present = _as_output(node.outputs[new])
                        return (node, present, side) if present is not None else None
            elif _is_view_or_transpose(node):
                stack.append(node.outputs[0])
            elif node.op_type in ("Concat", "TensorScatter") and node.inputs[0] is value:
                present = _as_output(node.outputs[0])
                if present is not None:
                    return node, present, None
    return None


def grown_value(past: ir.Value) -> ir.Value | None:
    """The cache ``past`` as the node that extends it writes it; None if nothing does."""
    grown = _grown(past)
    if grown is None:
        return None
    node, _, side = grown
    op = fused_op(node)
    return node.outputs[op.present[side] if op and side is not None else 0]


def _as_output(value: ir.Value) -> ir.Value | None:
    """``value`` or a view of it, if that is a graph output."""
    stack = [value]
    while stack:
        current = stack.pop()
        if current.is_graph_output():
            return current
        stack.extend(node.outputs[0] for node in readers(current) if _is_view_or_transpose(node))
    return None


def _is_view_or_transpose(node: ir.Node) -> bool:
    # Exporters also write a Concat of one tensor.
    alone = node.op_type == "Concat" and len(node.inputs) == 1
    return node.op_type in VIEWS or node.op_type == "Transpose" or alone


def _side(present: ir.Value) -> tuple[int, ir.Node]:
    """Whether an extended cache is a key (0) or a value (1), and the node that multiplies by it."""
    source = present
    while (node := source.producer()) is not None and _is_view_or_transpose(node):
        source = node.inputs[0]  # type: ignore[assignment]
    stack = [source]
    for value in stack:  # which grows
        for node in readers(value):
            op = fused_op(node)
            if op:
                return (1 if value is node.inputs[op.new[1]] else 0), node
            if node.op_type in PRODUCTS:
                return (1 if any(after_softmax(v) for v in node.inputs) else 0), node
            stack += [v for v in node.outputs if v not in stack]
    raise InputError(f"{present.name} is not a KV cache: no product reads it; rename this output.")


def after_softmax(value: ir.Value | None) -> bool:
    """Whether ``value`` is attention weights: computed from a softmax, without a product in between."""
    level = {value}
    for _ in range(_SOFTMAX_STEPS + 1):
        nodes = {node for v in level if v is not None and (node := v.producer()) is not None}
        if any(node.op_type == "Softmax" for node in nodes):
            return True
        level = {v for node in nodes if node.op_type not in PRODUCTS for v in node.inputs}
    return False


def kv_bytes_per_token(model: ir.Model) -> int:
    """Bytes that one more token of context adds to the KV cache at batch size 1."""
    return sum(map(pair_bytes_per_token, kv_pairs(model)))


def pair_bytes_per_token(pair: KVPair) -> int:
    """Bytes that one more token of context adds to the ``pair`` at batch size 1."""
    sizes = zip(map(pair.geometry, (0, 1)), pair.past, strict=True)
    return sum(
        int(heads * size * (past.dtype or ir.DataType.FLOAT).itemsize) for (heads, size), past in sizes
    )


@dataclass(frozen=True)
class StatePair:
    """A state of fixed size that a layer without softmax attention keeps: a graph input and an output."""

    past: ir.Value
    present: ir.Value

    @property
    def shape(self) -> tuple[int, ...]:
        """The state's shape without the batch."""
        return tuple(d for d in (self.past.shape or ())[1:] if isinstance(d, int))


def state_pairs(model: ir.Model) -> tuple[StatePair, ...]:
    """The states of a graph in the order of its inputs: past and present have the same name but for this word."""
    outputs = {value.name: value for value in model.graph.outputs}
    pairs = [
        StatePair(value, outputs[name])
        for value in model.graph.inputs
        if not PAST.match(value.name or "")
        and (name := (value.name or "").replace("past", "present", 1)) in outputs
    ]
    # Only the batch of a state is open.
    return tuple(
        p for p in pairs if p.past is not p.present and 0 < len(p.shape) == len(p.past.shape or ()) - 1
    )
