"""Find what each layer's tokens are mixed in: what the inputs of a graph mean, its activations, its attention cores.

Inputs are known by their usual names; in a graph with names of its own by what reads them: token ids choose rows of the
largest table, positions reach the rotary tables or choose rows of a table of positions, the mask reaches neither. A
wrong guess would not pass the proof of a rewrite, which runs the graph on known tokens.

With a KV cache a core is the first node on every path from the layer's past key and past value to the logits. Without
one it is a fused attention, or a product with a softmax, and so it is where several layers attend to one cache:

    past ─► Concat ─┬─► core of the layer that lends ─► … ─► o ─► …
                    └─► core of a layer that borrows, which has queries of its own
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.batch import EMBEDDINGS, MASK, PIXELS, POSITIONS, SIDES, TOKEN_TYPES, TOKENS, WRITE_INDICES
from nbl_export.errors import InputError
from nbl_export.files import parse_json
from nbl_export.graph.cache import KVPair, after_softmax, grown_value, kv_pairs
from nbl_export.graph.operators import PRODUCTS, SHAPE_ONLY, VIEWS, fused_op, is_constant, readers

_NAMED = (TOKENS, EMBEDDINGS, PIXELS, MASK, POSITIONS, TOKEN_TYPES, WRITE_INDICES)
INPUTS_KEY = "nbl_export.inputs"  # metadata: the inputs that have names of their own, by their usual names


# what inputs mean ---------------------------------------------------------------------------------


def roles(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs of the graph by their usual names; those that have no known meaning are left out."""
    inputs = {str(v.name): v for v in model.graph.inputs}
    found = {name: value for name, value in inputs.items() if name in _NAMED}
    try:
        remembered = dict(parse_json(model.metadata_props.get(INPUTS_KEY, "{}")))
    except (TypeError, ValueError):
        remembered = {}
    found |= {n: inputs[own] for n, own in remembered.items() if n in _NAMED and own in inputs}
    others = [v for v in inputs.values() if v not in found.values() and _is_of_tokens(v)]
    if not found.keys() & {TOKENS, EMBEDDINGS, PIXELS}:
        sizes = {v: max(map(_rows, _chosen_by(v, views_only=True)), default=0) for v in others}
        largest = [v for v, size in sizes.items() if size == max(sizes.values()) > 0]
        if len(largest) == 1:
            found[TOKENS] = largest[0]
            others.remove(largest[0])
    if TOKENS in found:
        placed = [v for v in others if _chosen_by(v, views_only=False)]
        for name, left in ((POSITIONS, placed), (MASK, [v for v in others if v not in placed])):
            if name not in found and len(left) == 1:
                found[name] = left[0]
    return found


def remember_roles(model: ir.Model) -> None:
    """Write into the metadata what the inputs with own names mean: a rewritten graph may not show it any more."""
    if own := {name: str(value.name) for name, value in roles(model).items() if value.name != name}:
        model.metadata_props[INPUTS_KEY] = json.dumps(own)


def _is_of_tokens(value: ir.Value) -> bool:
    integers = value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    return integers and value.shape is not None and len(value.shape) == 2


def _rows(gather: ir.Node) -> int:
    """The rows of the table that ``gather`` reads; 0 for what is none."""
    shape = gather.inputs[0].shape if gather.inputs[0] is not None else None
    return shape[0] if shape is not None and len(shape) == 2 and isinstance(shape[0], int) else 0


def _chosen_by(value: ir.Value, views_only: bool) -> list[ir.Node]:
    """The Gathers of constant tables that ``value`` chooses rows of; else also the rotary operators that it reaches."""
    found, stack, seen = [], [value], set[ir.Node]()
    for one in stack:  # which grows
        for node in set(readers(one)) - seen:
            seen.add(node)
            chosen = node.op_type == "Gather" and node.inputs[1] is one and is_constant(node.inputs[0])
            if chosen or (node.op_type in ("Cos", "Sin") and not views_only):
                found.append(node)
            elif not views_only or node.op_type in VIEWS:
                stack += node.outputs
    return found


# cores --------------------------------------------------------------------------------------------


class NotFound(Exception):
    """A part of attention is not there: ``check`` says which, ``found`` what is there instead."""

    def __init__(self, check: str, found: str) -> None:
        self.check, self.found = check, found


def reach(values: Iterable[ir.Value], stop: Collection[ir.Node] = ()) -> set[ir.Node]:
    """All nodes that ``values`` flow into, up to those at which to ``stop``."""
    seen: set[ir.Node] = set()
    stack = list(values)
    while stack:
        new = set(readers(stack.pop())) - seen
        seen |= new
        stack.extend(v for node in new if node not in stop for v in node.outputs)
    return seen


class Search:
    """What the search for every layer needs of the whole graph, whose first output beside the cache are the logits.

    ``activations`` are computed from the token ids (or embeddings, or pixels).
    """

    def __init__(self, model: ir.Model) -> None:
        cache = {v for pair in kv_pairs(model) for v in pair.present}
        self.logits = next((v.producer() for v in model.graph.outputs if v not in cache), None)
        tokens = [v for name, v in roles(model).items() if name in (TOKENS, EMBEDDINGS, PIXELS)]
        if not tokens:
            names = ", ".join(repr(str(v.name)) for v in model.graph.inputs)
            raise InputError(
                f"The graph has no input {TOKENS} that its layers are computed from (its inputs: {names}): rename the "
                "input that takes token ids."
            )
        self.activations = {v for node in reach(tokens) for v in node.outputs}
        self.order = {node: i for i, node in enumerate(model.graph)}
        self.before_logits: set[ir.Node] = set()
        stack = [self.logits]
        while stack:
            node = stack.pop()
            if node is not None and node in self.order and node not in self.before_logits:
                self.before_logits.add(node)
                makers = (v.producer() for v in node.inputs if v is not None)
                stack.extend(m for m in makers if m is not None and m.op_type not in SHAPE_ONLY)

    def made_at(self, value: ir.Value) -> int:
        """The place of the node that makes ``value``; -1 for an input."""
        node = value.producer()
        return -1 if node is None else self.order.get(node, -1)


def core_of(search: Search, pasts: tuple[ir.Value, ir.Value]) -> ir.Node:
    """The first node that both pasts reach and that lies on every path from either to the logits.

    In topological order, a node lies on every path if no edge passes over it.
    """
    key, value = (reach([past]) for past in pasts)
    if search.logits is None or search.logits not in key or search.logits not in value:
        raise NotFound("the past key and value reach the first output", "no path")
    order = search.order

    def farthest(values: Iterable[ir.Value]) -> int:
        return max((order[n] for v in values for n in readers(v) if n in search.before_logits), default=-1)

    far = farthest(pasts)
    for node in sorted((key | value) & search.before_logits, key=order.__getitem__):
        if far <= order[node] and node in key and node in value:
            return node
        far = max(far, farthest(node.outputs))
    raise NotFound("one node lies on every path from the cache to the logits", "none")


@dataclass(frozen=True)
class Core:
    """A layer's core, or its past; the KV pair that is its own, and the numbers of the layers that attend to it too.

    ``lent`` are the keys and values that a layer attends to without a pair of its own.
    """

    node: ir.Node | tuple[ir.Value, ir.Value]
    pair: int | None = None
    read_by: tuple[int, ...] = ()
    lent: tuple[ir.Value, ...] = ()


def cores_of(pairs: Sequence[KVPair], visible: Sequence[ir.Node]) -> list[Core]:
    """The core of each layer in order: of each pair, or of all that attend to one, or those that are ``visible``."""
    groups: list[tuple[int | None, list[int], tuple[ir.Value, ...]]] = []
    if pairs:
        every = set(visible)
        of_pairs = [reach([p.past[0]], every) & reach([p.past[1]], every) & every for p in pairs]
        found = set().union(*of_pairs)
        # Each of them attends to one pair, and each pair has one at least; with as many, none is lent.
        if not all(of_pairs) or not len(pairs) < len(found) == sum(map(len, of_pairs)):
            return [Core(pair.past, pair.index) for pair in pairs]
        visible = [node for node in visible if node in found]
        for pair, nodes in zip(pairs, of_pairs, strict=True):
            grown = tuple(v for past in pair.past if (v := grown_value(past)) is not None)
            groups.append((pair.index, [i for i, node in enumerate(visible) if node in nodes], grown))
    else:  # those that are given the keys and values of an earlier one borrow them
        given: dict[tuple[ir.Value, ...], list[int]] = {}
        for number, node in enumerate(visible):
            new = op.new if (op := fused_op(node)) else ()
            kv = tuple(v for i in new if len(node.inputs) > i and (v := node.inputs[i]) is not None)
            given.setdefault(kv if len(kv) == len(SIDES) else tuple(node.outputs), []).append(number)
        groups = [(None, numbers, kv) for kv, numbers in given.items()]
    cores: dict[int, Core] = {}
    for index, (lender, *others), lent in groups:
        cores[lender] = Core(visible[lender], index, tuple(others))
        cores |= {i: Core(visible[i], lent=lent) for i in others}
    return [cores[i] for i in sorted(cores)]


def visible_cores(model: ir.Model) -> list[ir.Node]:
    """Attention that is recognized without a cache: a fused operator, or a product with a softmax."""

    def mixes(node: ir.Node) -> bool:
        product = node.op_type in PRODUCTS and not any(is_constant(v) for v in node.inputs)
        return product and any(after_softmax(v) for v in node.inputs)

    return [node for node in model.graph if fused_op(node) or mixes(node)]
