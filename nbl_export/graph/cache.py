"""The KV cache of a decoder graph: its inputs and outputs, and how some of them are removed.

    past ─► Concat │ TensorScatter │ fused attention ─► present

Inputs and outputs are paired by name where the names follow the usual pattern. Otherwise they are paired by
structure: a pair is an input that one of these operators turns into an output. Keys and values are told apart
by the softmax: keys are multiplied before it, values after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from nbl_export.batch.names import EMBEDDINGS, MASK, SIDES, TOKENS, WRITE_INDICES
from nbl_export.errors import BuildError, InputError
from nbl_export.files import parse_json
from nbl_export.graph.operators import PRODUCTS, VIEWS, fused_op, readers, weight_shape
from nbl_export.graph.roles import roles
from nbl_export.graph.states import PAST, state_pairs
from nbl_export.graph.tensors import int64_initializer
from nbl_export.records import from_json

T = TypeVar("T")
PRESENT = re.compile(r"^present\.(\d{1,6})\.(key|value)$")
_NUMBER = re.compile(r"\d+")
# Metadata of our graphs: the model's layer index of each KV pair, and what each layer of a rewritten graph is
# (:class:`.summary.DescribedLayer`).
KV_LAYERS_KEY, LAYERS_KEY = "nbl_export.kv_layers", "nbl_export.layers"
# The maximum number of nodes between the softmax and the product with V.
_SOFTMAX_STEPS = 8
_WIDEST = 256  # tensors that attention weights are computed from, at the same distance


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
    if len(set(layers)) < len(layers) or min(layers, default=0) < 0:
        raise InputError(_not_ours(KV_LAYERS_KEY))
    return layers


def metadata_list(model: ir.Model, key: str, kind: type[T]) -> tuple[T, ...]:
    """A list of ``kind`` that nbl-export wrote into the metadata; empty if there is none.

    Raises :class:`InputError` for anything else under that key.
    """
    try:
        found = parse_json(model.metadata_props.get(key, "[]"))
        return tuple(from_json(tuple[kind, ...], found, key, "remove it"))  # type: ignore[valid-type]
    except (ValueError, InputError):
        raise InputError(_not_ours(key)) from None


def _not_ours(key: str) -> str:
    return f"The graph's metadata {key} was not written by nbl-export: remove that entry."


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
        if isinstance(heads, int) and isinstance(size, int) and min(heads, size) >= 0:
            return heads, size
        for usage in self.past[0].uses():
            count = usage.node.attributes.get("kv_num_heads")
            if fused_op(usage.node) and count is not None:
                return count.as_int(), _head_size(usage.node)
        raise InputError(
            f"The number of heads and the head_dim of {self.past[0].name} are unknown: give that graph input a "
            "shape with both."
        )


def _head_size(attention: ir.Node) -> int:
    """The head_dim of a GroupQueryAttention: the width of its projections divided by the number of heads."""
    queries, keys = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    packed = len(attention.inputs) < 2 or attention.inputs[1] is None
    heads = queries + 2 * keys if packed else queries
    value = attention.inputs[0]
    while value is not None:
        last = value.shape[-1] if value.shape is not None and len(value.shape) else None
        node = value.producer()
        if isinstance(last, int):
            return last // heads
        if node is not None and (known := weight_shape(node)):
            return known[1] // heads
        value = node.inputs[0] if node is not None and node.inputs else None
    raise InputError(f"The head_dim of {attention.name} is unknown: run shape inference on the graph.")


def kv_pairs(model: ir.Model) -> tuple[KVPair, ...]:
    """The KV pairs of a graph in layer order; raises :class:`InputError` for an incomplete pair."""
    past = _by_index(model.graph.inputs, PAST)
    present = _by_index(model.graph.outputs, PRESENT)
    if not past or not present:
        return _pairs_by_structure(model)
    pairs = []
    for index in sorted(past.keys() | present.keys()):
        sides = past.get(index, {}), present.get(index, {})
        if any(set(s) != set(SIDES) for s in sides):
            raise InputError(
                f"The graph's KV cache {index} is incomplete: past and present key and value are needed; export the "
                "model again."
            )
        (pk, pv), (qk, qv) = ([s[side] for side in SIDES] for s in sides)
        pairs.append(KVPair(index, (pk, pv), (qk, qv)))
    return tuple(pairs)


def _by_index(values: Sequence[ir.Value], pattern: re.Pattern[str]) -> dict[int, dict[str, ir.Value]]:
    found: dict[int, dict[str, ir.Value]] = {}
    for value in values:
        if match := pattern.match(value.name or ""):
            found.setdefault(int(match[1]), {})[match[2]] = value
    return found


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
    stack: list[ir.Value] = [source]
    seen: set[ir.Node] = set()
    while stack:
        value = stack.pop()
        for node in readers(value):
            if node in seen:
                continue
            seen.add(node)
            op = fused_op(node)
            if op:
                return (1 if value is node.inputs[op.new[1]] else 0), node
            if node.op_type in PRODUCTS:
                return (1 if any(after_softmax(v) for v in node.inputs) else 0), node
            stack.extend(node.outputs)
    raise InputError(f"{present.name} is not a KV cache: no product reads it; rename this output.")


def after_softmax(value: ir.Value | None) -> bool:
    """Whether ``value`` is attention weights: computed from a softmax, without a product in between."""
    level = {value}
    for _ in range(_SOFTMAX_STEPS + 1):
        nodes = {node for v in level if v is not None and (node := v.producer()) is not None}
        if any(node.op_type == "Softmax" for node in nodes):
            return True
        level = {v for node in nodes if node.op_type not in PRODUCTS for v in node.inputs}
        if len(level) > _WIDEST:
            return False
    return False


def kv_bytes_per_token(model: ir.Model) -> int:
    """Bytes that one more token of context adds to the KV cache at batch size 1."""
    return sum(map(pair_bytes_per_token, kv_pairs(model)))


def pair_bytes_per_token(pair: KVPair) -> int:
    """Bytes that one more token of context adds to the ``pair`` at batch size 1."""
    total = 0
    for side, value in enumerate(pair.past):
        heads, size = pair.geometry(side)
        if value.dtype is None or value.dtype == ir.DataType.STRING:
            raise InputError(f"The cache {value.name} is not a numeric tensor: export the model again.")
        total += int(heads * size * value.dtype.itemsize)
    return total


def remove_pairs(model: ir.Model, removed: Sequence[int], pairs: Sequence[KVPair]) -> None:
    """Remove the KV pairs of layers whose attention was removed, and renumber the rest contiguously.

    ``pairs`` are all pairs of the graph, found before the attention was removed.

    1. Remove the ``present`` outputs of removed layers.
    2. A removed cache may still be read by a ``Shape`` (exporters take the past length from the first
       layer). Such a ``Shape`` reads a retained layer instead or, if there is none, is computed from
       ``attention_mask`` and ``input_ids``.
    3. Remove dead nodes and the past inputs; an input that is still read is an error.
    4. If the names contain the pair's number, what is left is numbered without gaps where a layer has nothing left, in
       its old order: 0, 1, 2 …, also the states of other layers.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    gone = [p for p in pairs if p.index in set(removed)]
    retained = [p for p in pairs if p.index not in set(removed)]
    templates = _templates(pairs)
    for pair in gone:
        for value in pair.present:
            graph.outputs.remove(value)
    RemoveUnusedNodesPass()(model)
    for pair in gone:
        for side in range(len(SIDES)):
            for value, twins in ((pair.past[side], "past"), (pair.present[side], "present")):
                twin = getattr(retained[0], twins)[side] if retained else None
                for usage in [usage for one in _of_one_shape(value) for usage in one.uses()]:
                    if usage.node.op_type == "Shape":
                        _reroute_shape(model, usage.node, pair.geometry(side), twin, grown=twins == "present")
    RemoveUnusedNodesPass()(model)
    for pair in gone:
        for value in pair.past:
            if left := [f"{u.node.op_type} ({u.node.name})" for u in value.uses()]:
                raise BuildError(f"{value.name} cannot be removed: a {left[0]} still reads it.")
            graph.inputs.remove(value)
    states = state_pairs(model)
    numbers = {int(found[0]) for s in states if (found := _NUMBER.search(str(s.past.name)))}
    nothing_left = [pair.index for pair in gone if pair.index not in numbers]

    def new(number: int) -> int:
        return number - sum(other < number for other in nothing_left)

    for pair in retained:
        for template, value in zip(templates, (*pair.past, *pair.present), strict=False):
            value.name = template.format(new(pair.index))
    if templates:
        for value in (v for pair in states for v in (pair.past, pair.present)):
            value.name = _NUMBER.sub(lambda found: str(new(int(found[0]))), str(value.name), count=1)


def _of_one_shape(value: ir.Value) -> list[ir.Value]:
    """``value`` and what has its shape by the operators that read it: a Cast, a Concat of it alone …"""
    found = [value]
    for one in found:
        for node in readers(one):
            alone = node.op_type == "Concat" and len(node.inputs) == 1
            if alone or node.op_type in ("Cast", "CastLike", "Identity"):
                found.append(node.outputs[0])
    return found


def _templates(pairs: Sequence[KVPair]) -> list[str]:
    """The names of past key, past value, present key and present value with {} for the pair's number.

    Empty if the names do not contain the numbers 0, 1, 2 …: such pairs cannot be renumbered.
    """
    templates = []
    for names in zip(*([str(v.name) for v in (*p.past, *p.present)] for p in pairs), strict=True):
        for match in re.finditer(r"\d+", names[0]):
            template = (names[0][: match.start()] + "\0" + names[0][match.end() :]).replace("{", "{{")
            template = template.replace("}", "}}").replace("\0", "{}")
            if all(template.format(pair.index) == name for pair, name in zip(pairs, names, strict=True)):
                templates.append(template)
                break
    return templates if len(templates) == 2 * len(SIDES) else []


def _reroute_shape(
    model: ir.Model, node: ir.Node, geometry: tuple[int, int], twin: ir.Value | None, grown: bool
) -> None:
    """Let a ``Shape`` of a removed cache read ``twin``, or compute it: [batch, heads, length, head_dim]."""
    if twin is not None:
        node.replace_input_with(0, twin)
        return
    inputs = roles(model)
    tokens = inputs.get(TOKENS, inputs.get(EMBEDDINGS))
    if tokens is None or MASK not in inputs:
        raise BuildError(
            f"{node.name} reads the length of a removed cache, and the graph has no {TOKENS} and {MASK} to compute "
            "it from: export the model with both inputs."
        )

    def emit(op: str, args: list[ir.Value], **attributes: int) -> ir.Value:
        new = ir.node(op, args, attributes)
        node.prepend(new)
        return new.outputs[0]

    def constant(number: int) -> ir.Value:
        return int64_initializer(model.graph, f"cache.dim.{number}", [number])

    def dimension(value: ir.Value, axis: int) -> ir.Value:
        # Shape has start and end only since opset 15.
        return emit("Gather", [emit("Shape", [value]), constant(axis)], axis=0)

    heads, size = geometry
    length = dimension(inputs[MASK], 1)
    if not grown:
        length = emit("Sub", [length, dimension(tokens, 1)])
    batch = dimension(tokens, 0)
    dimensions = [batch, constant(heads), length, constant(size)]
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    stop = node.attributes["end"].as_int() if "end" in node.attributes else len(dimensions)
    result = emit("Concat", dimensions[slice(start, stop)], axis=0)
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
