"""The KV cache of a decoder graph: its inputs and outputs, and taking some of them away."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nbl_export.errors import BuildError, InputError

_PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")
_PRESENT = re.compile(r"^present\.(\d+)\.(key|value)$")
SIDES = ("key", "value")
# Symbolic dimensions of a decoder graph. MAX is the length of a static cache.
BATCH, SEQUENCE, PAST, TOTAL, MAX = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "max_sequence_length",
)
WRITE_INDICES = "write_indices"  # the input that only a static cache has
KV_LAYERS_KEY = "nbl_export.kv_layers"  # metadata: the model's layer of each KV pair


def is_static(model: ir.Model) -> bool:
    """Whether the decoder keeps its cache in buffers of fixed length."""
    return any(value.name == WRITE_INDICES for value in model.graph.inputs)


def kv_layers(model: ir.Model) -> tuple[int, ...]:
    """The model's layer of each KV pair: from the metadata, or its number where there are none."""
    known = model.metadata_props.get(KV_LAYERS_KEY)
    return tuple(json.loads(known)) if known else tuple(pair.index for pair in kv_pairs(model))


def past_name(index: int, side: str) -> str:
    return f"past_key_values.{index}.{side}"


def present_name(index: int, side: str) -> str:
    return f"present.{index}.{side}"


@dataclass(frozen=True)
class KVPair:
    """The cache of one attention layer: past (graph inputs) and present (outputs), each (key, value)."""

    index: int
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]


def kv_pairs(model: ir.Model) -> tuple[KVPair, ...]:
    """The KV pairs of a graph by index; raises :class:`InputError` for an incomplete one."""
    past = _by_index(model.graph.inputs, _PAST)
    present = _by_index(model.graph.outputs, _PRESENT)
    pairs = []
    for index in sorted(past.keys() | present.keys()):
        sides = past.get(index, {}), present.get(index, {})
        if any(set(s) != set(SIDES) for s in sides):
            raise InputError(
                f"The graph's KV cache {index} is incomplete: it has no full past/present key and value."
            )
        (pk, pv), (qk, qv) = ([s[side] for side in SIDES] for s in sides)
        pairs.append(KVPair(index, (pk, pv), (qk, qv)))
    return tuple(pairs)


def kv_bytes_per_token(model: ir.Model) -> int:
    """Bytes that one more token of context adds to the cache, batch 1."""
    total = 0
    for pair in kv_pairs(model):
        for value in pair.past:
            assert value.shape is not None and value.dtype is not None
            heads, dim = value.shape[1], value.shape[3]
            assert isinstance(heads, int) and isinstance(dim, int)
            total += int(heads * dim * value.dtype.itemsize)
    return total


def _by_index(values: Sequence[ir.Value], pattern: re.Pattern[str]) -> dict[int, dict[str, ir.Value]]:
    found: dict[int, dict[str, ir.Value]] = {}
    for value in values:
        if match := pattern.match(value.name or ""):
            found.setdefault(int(match[1]), {})[match[2]] = value
    return found


def remove_pairs(model: ir.Model, removed: Sequence[int]) -> None:
    """Remove KV pairs whose attention is gone already, and renumber the rest contiguously.

    1. ``present`` outputs of removed layers go.
    2. A removed ``past`` input may still be asked for its shape (exporters read the past length off
       the first layer): that question is put to a layer that stays, or, if none does, answered from
       ``attention_mask`` and ``input_ids``.
    3. Dead nodes go; a removed input with a reader left is an error.
    4. The remaining pairs are numbered 0, 1, 2 … in their old order.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    pairs = kv_pairs(model)
    gone = [p for p in pairs if p.index in set(removed)]
    kept = [p for p in pairs if p.index not in set(removed)]
    for pair in gone:
        for value in pair.present:
            graph.outputs.remove(value)
    RemoveUnusedNodesPass()(model)
    for pair in gone:
        for side, value in enumerate(pair.past):
            for usage in list(value.uses()):
                _reroute_shape(model, usage.node, kept[0].past[side] if kept else None)
    RemoveUnusedNodesPass()(model)
    for pair in gone:
        for value in pair.past:
            if readers := [f"{u.node.op_type} ({u.node.name})" for u in value.uses()]:
                raise BuildError(f"{value.name} cannot be removed: a {readers[0]} still reads it.")
            graph.inputs.remove(value)
    for new, pair in enumerate(kept):
        for side, name in enumerate(SIDES):
            pair.past[side].name = past_name(new, name)
            pair.present[side].name = present_name(new, name)


def _reroute_shape(model: ir.Model, node: ir.Node, twin: ir.Value | None) -> None:
    if node.op_type != "Shape":
        return  # counted as an error by the caller
    if twin is not None:
        node.replace_input_with(0, twin)
        return
    past = node.inputs[0]
    assert past is not None and past.shape is not None
    inputs = {v.name: v for v in model.graph.inputs}
    rank = len(past.shape)
    # [batch, heads, past length, head dim] from the inputs that every decoder has.
    pieces: list[ir.Value] = []

    def emit(op: str, args: list[ir.Value], **attributes: int) -> ir.Value:
        new = ir.node(op, args, attributes)
        node.prepend(new)
        return new.outputs[0]

    for axis, dim in enumerate(past.shape):
        if isinstance(dim, int):
            constant = ir.Value(name=f"{past.name}.dim{axis}", const_value=ir.tensor(np.array([dim])))
            if constant.name not in model.graph.initializers:
                model.graph.register_initializer(constant)
            pieces.append(model.graph.initializers[f"{past.name}.dim{axis}"])
        elif axis == 0:
            pieces.append(emit("Shape", [inputs["input_ids"]], start=0, end=1))
        else:
            total = emit("Shape", [inputs["attention_mask"]], start=1, end=2)
            new = emit("Shape", [inputs["input_ids"]], start=1, end=2)
            pieces.append(emit("Sub", [total, new]))
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    stop = node.attributes["end"].as_int() if "end" in node.attributes else rank
    chosen = pieces[slice(start, stop)]
    result = chosen[0] if len(chosen) == 1 else emit("Concat", chosen, axis=0)
    if len(chosen) == 1 and result.producer() is None:
        result = emit("Identity", [result])
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
