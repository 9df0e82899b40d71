"""Find the attention of every layer in a decoder graph, by structure alone.

    h ─► norm ─► x ─► MatMul q,k,v ─► … ─► core ─► … ─► MatMul o ─► (+ bias) ─► y ─► Add ─► …
                                            ▲│                                       ▲
                              past key/value┘└► present key/value             h ─────┘

1. The core is the first node that the layer's past key and past value both reach and that every path
   from them to the logits runs through: a fused `Attention`, or the product with V.
2. y is what the first linear map (a MatMul or Gemm with constant weights) after the core writes, its
   bias included.
3. x is the one activation that all linear maps feeding the core read. Positions and masks also reach
   the core, but carry no activations.
4. h is the other operand of the addition y goes into.

Whatever does not fit is a :class:`Refusal` that says which check failed and on what. Finding is not
proof: see :mod:`nbl_export.graph.prove`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.graph.cache import KVPair, kv_pairs

_LINEAR = {"MatMul", "Gemm"}
# These read a tensor's shape, not its numbers: no activation flows through them.
_SHAPE_ONLY = {"Shape", "Size"}
_MAX_STEPS = 12


@dataclass(frozen=True)
class AttentionRegion:
    """One layer's attention in a graph; ``h`` is None where y is not added to a residual stream."""

    layer: int
    x: ir.Value
    y: ir.Value
    h: ir.Value | None
    core: str
    ops: int


@dataclass(frozen=True)
class Refusal:
    """Why no rewritable attention was found for a layer's KV cache."""

    layer: int
    check: str
    found: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.check} (found: {self.found})"


class _NotFound(Exception):
    def __init__(self, check: str, found: str) -> None:
        self.check, self.found = check, found


def find_regions(model: ir.Model) -> list[AttentionRegion | Refusal]:
    """One entry for each KV pair of the graph, in order."""
    activations = _activations(model)
    found: list[AttentionRegion | Refusal] = []
    for pair in kv_pairs(model):
        try:
            found.append(_region(model, pair, activations))
        except _NotFound as reason:
            found.append(Refusal(pair.index, reason.check, reason.found))
    return found


def _region(model: ir.Model, pair: KVPair, activations: set[ir.Value]) -> AttentionRegion:
    core = _core(model, pair)
    y, last = _output(core)
    x, ops = _input(last, activations)
    return AttentionRegion(pair.index, x, y, _residual(y), core.op_type, ops)


def _readers(value: ir.Value) -> list[ir.Node]:
    return [u.node for u in value.uses() if u.node.op_type not in _SHAPE_ONLY]


def _reach(values: Iterable[ir.Value], without: ir.Node | None = None) -> set[ir.Node]:
    """All nodes that numbers of ``values`` flow into, not passing through ``without``."""
    seen: set[ir.Node] = set()
    stack = list(values)
    while stack:
        for node in _readers(stack.pop()):
            if node not in seen and node is not without:
                seen.add(node)
                stack.extend(node.outputs)
    return seen


def _activations(model: ir.Model) -> set[ir.Value]:
    """Values that carry activations: computed from the token ids (or embeddings) themselves."""
    tokens = [v for v in model.graph.inputs if v.name in ("input_ids", "inputs_embeds")]
    return {v for node in _reach(tokens) for v in node.outputs}


# 1 -----------------------------------------------------------------------------------------------


def _core(model: ir.Model, pair: KVPair) -> ir.Node:
    logits = model.graph.outputs[0].producer()
    key, value = (_reach([past]) for past in pair.past)
    if logits is None or logits not in key or logits not in value:
        raise _NotFound("the past key and value reach the first output", "no path")
    both = key & value
    for node in model.graph:  # topological order
        if node in both and logits not in _reach(pair.past, without=node):
            return node
    raise _NotFound("one node lies on every path from the cache to the logits", "none")


# 2 -----------------------------------------------------------------------------------------------


def _output(core: ir.Node) -> tuple[ir.Value, ir.Node]:
    node = core
    for _ in range(_MAX_STEPS):
        readers = _readers(node.outputs[0])
        if len(readers) != 1:
            raise _NotFound(
                "the attention's result has one reader up to the output projection", f"{len(readers)}"
            )
        node = readers[0]
        if node.op_type in _LINEAR and _is_constant(node.inputs[1]):
            return _with_bias(node.outputs[0]), node
        if node.op_type == "Add" and not any(_is_constant(v) for v in node.inputs):
            raise _NotFound(
                "an output projection comes before the residual addition", "an Add of two activations"
            )
    raise _NotFound("an output projection follows the attention", f"{node.op_type} after {_MAX_STEPS} nodes")


def _past_casts(value: ir.Value) -> ir.Value:
    """What a half graph hands on: ``value`` itself, or as the Cast that alone reads it writes it."""
    readers = _readers(value)
    while len(readers) == 1 and readers[0].op_type == "Cast":
        value = readers[0].outputs[0]
        readers = _readers(value)
    return value


def _with_bias(value: ir.Value) -> ir.Value:
    summand = _past_casts(value)
    readers = _readers(summand)
    if len(readers) == 1 and readers[0].op_type == "Add":
        other = _other(readers[0], summand)
        if _is_constant(other):
            return readers[0].outputs[0]
    return value


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _is_constant(value: ir.Value | None) -> bool:
    """A weight: an initializer, or one that only constant nodes lie behind (Transpose, Cast …)."""
    if value is None:
        return False
    if value.is_initializer():
        return True
    producer = value.producer()
    if producer is None or producer.op_type in _SHAPE_ONLY:
        return False
    if producer.op_type == "Constant":
        return True
    inputs = [v for v in producer.inputs if v is not None]
    return bool(inputs) and all(_is_constant(v) for v in inputs)


# 3 -----------------------------------------------------------------------------------------------


def _input(projection: ir.Node, activations: set[ir.Value]) -> tuple[ir.Value, int]:
    sources: Counter[ir.Value] = Counter()
    seen: set[ir.Node] = {projection}
    stack = [projection.inputs[0]]
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if value is None or node is None or node in seen or value not in activations:
            continue
        seen.add(node)
        if node.op_type in _LINEAR and _is_constant(node.inputs[1]):
            assert node.inputs[0] is not None
            sources[node.inputs[0]] += 1
        else:
            stack.extend(node.inputs)
    if len(sources) != 1:
        names = ", ".join(sorted(str(v.name) for v in sources)) or "none"
        raise _NotFound("all projections of the layer read one tensor", names)
    return next(iter(sources)), len(seen)


# 4 -----------------------------------------------------------------------------------------------


def _residual(y: ir.Value) -> ir.Value | None:
    y = _past_casts(y)
    readers = _readers(y)
    if len(readers) == 1 and readers[0].op_type == "Add":
        return _other(readers[0], y)
    return None
