"""The node of each layer where its tokens are mixed: from its KV cache, or recognized directly.

With a KV cache it is the first node on every path from the layer's past key and past value to the logits. Without one
it is a fused attention, or a product with a softmax, and so it is where several layers attend to one cache:

    past ─► Concat ─┬─► core of the layer that lends ─► … ─► o ─► …
                    └─► core of a layer that borrows, which has queries of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.batch.names import EMBEDDINGS, PIXELS, SIDES, TOKENS
from nbl_export.errors import InputError
from nbl_export.graph.cache import KVPair, after_softmax, grown_value
from nbl_export.graph.operators import PRODUCTS, SHAPE_ONLY, fused_op, is_constant, readers
from nbl_export.graph.roles import roles


class NotFound(Exception):
    """A part of attention is not there: ``check`` says which, ``found`` what is there instead."""

    def __init__(self, check: str, found: str) -> None:
        self.check, self.found = check, found


def reach(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes that ``values`` flow into."""
    seen: set[ir.Node] = set()
    stack = list(values)
    while stack:
        for node in readers(stack.pop()):
            if node not in seen:
                seen.add(node)
                stack.extend(node.outputs)
    return seen


def activations_of(model: ir.Model) -> set[ir.Value]:
    """The activations: values computed from the token ids (or embeddings, or pixels)."""
    tokens = [v for name, v in roles(model).items() if name in (TOKENS, EMBEDDINGS, PIXELS)]
    if not tokens:
        names = ", ".join(repr(str(v.name)) for v in model.graph.inputs)
        raise InputError(
            f"The graph has no input {TOKENS} that its layers are computed from (its inputs: {names}): rename the "
            "input that takes token ids."
        )
    return {v for node in reach(tokens) for v in node.outputs}


def core_of(search: Search, pasts: tuple[ir.Value, ir.Value]) -> ir.Node:
    """The first node that both pasts reach and that lies on every path from either to the logits.

    In topological order, a node lies on every path if no edge passes over it.
    """
    key, value = (reach([past]) for past in pasts)
    if search.logits is None or search.logits not in key or search.logits not in value:
        raise NotFound("the past key and value reach the first output", "no path")
    order = search.order
    between = [n for n in key | value if n in search.before_logits]

    def farthest(values: Iterable[ir.Value]) -> int:
        return max((order[n] for v in values for n in readers(v) if n in search.before_logits), default=-1)

    far = farthest(pasts)
    for node in sorted(between, key=order.__getitem__):
        if far <= order[node] and node in key and node in value:
            return node
        far = max(far, farthest(node.outputs))
    raise NotFound("one node lies on every path from the cache to the logits", "none")


@dataclass(frozen=True)
class Core:
    """A layer's ``core``, the KV pair that is its own, and the numbers of the layers that attend to this pair too.

    ``lent`` are the keys and values that a layer attends to without a pair of its own.
    """

    node: ir.Node | tuple[ir.Value, ir.Value]
    pair: int | None = None
    read_by: tuple[int, ...] = ()
    lent: tuple[ir.Value, ...] = ()


def cores_of(model: ir.Model, pairs: Sequence[KVPair], visible: Sequence[ir.Node]) -> list[Core]:
    """The core of each layer in order: of each pair, or of all that attend to one, or those that are ``visible``."""
    if not pairs:
        return _without_cache(visible)
    own = [Core(pair.past, pair.index) for pair in pairs]
    if len(visible) <= len(pairs):
        return own
    every = set(visible)
    readers_of = [_first(pair.past[0], every) & _first(pair.past[1], every) for pair in pairs]
    found = set().union(*readers_of)
    # Each of them attends to one pair, and each pair has one at least.
    if not all(readers_of) or len(found) != sum(map(len, readers_of)) or len(found) == len(pairs):
        return own
    number = {node: i for i, node in enumerate(n for n in visible if n in found)}
    cores: dict[int, Core] = {}
    for pair, nodes in zip(pairs, readers_of, strict=True):
        lender, *others = sorted(number[node] for node in nodes)
        by_number = {number[node]: node for node in nodes}
        grown = tuple(value for past in pair.past if (value := grown_value(past)) is not None)
        cores[lender] = Core(by_number[lender], pair.index, tuple(others))
        cores |= {i: Core(by_number[i], lent=grown) for i in others}
    return [cores[i] for i in sorted(cores)]


def _without_cache(visible: Sequence[ir.Node]) -> list[Core]:
    """The ``visible`` cores; those that are given the keys and values of an earlier one borrow them."""
    given: dict[tuple[ir.Value, ...], list[int]] = {}
    for number, node in enumerate(visible):
        op = fused_op(node)
        kv = (
            tuple(v for i in op.new if len(node.inputs) > i and (v := node.inputs[i]) is not None)
            if op
            else ()
        )
        if len(kv) == len(SIDES):
            given.setdefault(kv, []).append(number)
    cores = [Core(node) for node in visible]
    for kv, (lender, *others) in given.items():
        cores[lender] = Core(visible[lender], read_by=tuple(others))
        for number in others:
            cores[number] = Core(visible[number], lent=kv)
    return cores


def _first(value: ir.Value, cores: set[ir.Node]) -> set[ir.Node]:
    """Those of ``cores`` that ``value`` flows into without passing another."""
    seen: set[ir.Node] = set()
    stack = [value]
    while stack:
        for node in readers(stack.pop()):
            if node not in seen:
                seen.add(node)
                stack.extend(() if node in cores else node.outputs)
    return seen & cores


class Search:
    """What the search for every layer needs of the whole graph, computed once."""

    def __init__(self, model: ir.Model, logits: ir.Node | None) -> None:
        self.activations = activations_of(model)
        self.logits = logits
        self.order = {node: i for i, node in enumerate(model.graph)}
        self.before_logits: set[ir.Node] = set()
        stack = [logits] if logits is not None else []
        while stack:
            node = stack.pop()
            if node in self.before_logits or node not in self.order:
                continue
            self.before_logits.add(node)
            makers = (v.producer() for v in node.inputs if v is not None)
            stack.extend(m for m in makers if m is not None and m.op_type not in SHAPE_ONLY)

    def made_at(self, value: ir.Value) -> int:
        """The place of the node that makes ``value``; -1 for an input."""
        node = value.producer()
        return -1 if node is None else self.order.get(node, -1)


def visible_cores(model: ir.Model) -> list[ir.Node]:
    """Attention that is recognized without a cache: a fused operator, or a product with a softmax."""
    found = []
    for node in model.graph:
        product = node.op_type in PRODUCTS and not any(is_constant(v) for v in node.inputs)
        if fused_op(node) or (product and any(after_softmax(v) for v in node.inputs)):
            found.append(node)
    return found
