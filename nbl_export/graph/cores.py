"""The node of each layer where its tokens are mixed: from its KV cache, or recognized directly.

With a KV cache it is the first node on every path from the layer's past key and past value to the logits. Without one
it is a fused attention, or a product with a softmax.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from nbl_export.batch.names import EMBEDDINGS, PIXELS, TOKENS
from nbl_export.errors import InputError
from nbl_export.graph.cache import after_softmax
from nbl_export.graph.operators import PRODUCTS, SHAPE_ONLY, fused_op, is_constant, readers


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
    tokens = [v for v in model.graph.inputs if v.name in (TOKENS, EMBEDDINGS, PIXELS)]
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
