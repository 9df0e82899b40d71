"""Find what lies beside attention on the residual stream: the MLP of each layer, by structure alone.

    h ─► norm ─► x ─► … ─► y ─► (scale, norm) ─► Add ─► h' ─► …
    └────────────────────────────────────────────┘

1. The residual stream are the values that everything from the first layer to the logits passes through, one after
   another. Between two of them lies an addition: one of its terms is the earlier stream, the others are branches.
2. A branch with the output projection of an attention is that attention. Any other branch is an MLP, or another way
   of mixing tokens; the caller says how many of which there should be.
3. Where other values run beside the stream (embeddings for each layer, several streams), nothing passes through one.
   Then the search begins at each attention, and looks at what depends on its output alone: the first branch that
   is added behind it is the MLP of its layer.
4. u and y of a branch are among the values that all of it passes through: u before its first linear operator, y after
   it. Which of them they are, if any, is then proven numerically (:mod:`nbl_export.rewrite.prove`).

An MLP may be gated or plain, with its parts fused or not, beside the attention or after it, or a mixture of experts
as a whole: nothing is looked at but what everything passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from nbl_export.batch import EMBEDDINGS
from nbl_export.blocks import Block, Mlp
from nbl_export.graph.cores import Search, reach, roles
from nbl_export.graph.operators import (
    QUANTIZE,
    SKIP_NORMS,
    VIEWS,
    captured,
    is_constant,
    key,
    linear_op,
    readers,
)
from nbl_export.graph.regions import Output, Refusal, Region, later_bias

# What turns values into others of the same meaning: they are no y of their own.
_COPIES = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear", QUANTIZE, "Identity"})
# Which layers mix tokens in another way than by attention, by whether they have attention, and an MLP: those without
# attention; those with neither, where a layer is one thing alone; all of them, side by side with attention.
_MIXED: tuple[Callable[[bool, bool], bool], ...] = (
    lambda attention, _mlp: not attention,
    lambda attention, mlp: not attention and not mlp,
    lambda _attention, _mlp: True,
)
_RESHAPES = VIEWS - _COPIES - {"CastLike", "Dropout"}
_MAX_TERMS = 16  # of one sum
_MAX_CANDIDATES = 48  # tensors that may be y
_UNNAMED = Mlp(0)  # until the caller says which it is

# What is added to the stream: the attention of a layer, or something else.
Branch = int | Region


def find_branches(model: ir.Model, regions: Sequence[Region | Refusal]) -> list[Branch]:
    """The branches of the graph, in order; ``regions`` are its attentions, of which those that were found are known."""
    return list(_added(_Flow(Search(model), roles(model).get(EMBEDDINGS)), regions))


def mlp_regions(
    model: ir.Model, attentions: Sequence[Region | Refusal], candidates: Collection[Block], layers: int
) -> list[Region | Refusal]:
    """One entry for each MLP among the ``candidates`` of a model with so many ``layers``, in order.

    ``attentions`` are those of the graph, with the numbers of the model's layers.
    """
    wanted = [block for block in candidates if isinstance(block, Mlp)]
    found = find_branches(model, attentions)
    numbers = {entry.layer for entry in attentions}
    for mixed in _MIXED:
        expected: list[Block | None] = []
        for layer in range(layers):
            own: list[Block] = [Mlp(layer)] if Mlp(layer) in wanted else []
            expected += [layer] if layer in numbers else []
            expected += [None] if mixed(layer in numbers, bool(own)) else []
            expected += own
        # Attentions where attentions should be, and something else elsewhere.
        if [b if isinstance(b, int) else None for b in expected] == [
            b if isinstance(b, int) else None for b in found
        ]:
            pairs = zip(expected, found, strict=True)
            return [_named(block, branch, attentions) for block, branch in pairs if isinstance(block, Mlp)]
    search, other = Search(model), sum(isinstance(branch, Region) for branch in found)
    what = f"{len(found) - other} attentions and {other} others"
    starts = {attention.layer: _start(attention) for attention in attentions}
    regions: list[Region | Refusal] = []
    for block in wanted:
        start = starts.get(block.layer)
        behind = next(_added(_Flow(search, None, start), attentions), None) if start is not None else None
        regions.append(
            _named(block, behind, attentions)
            if isinstance(behind, Region)
            else Refusal(block, "every layer adds its attention and its MLP to one stream", what)
        )
    return regions


def _start(attention: Region | Refusal) -> ir.Node | None:
    """A node that the output of ``attention`` passes through, and nothing else of its layer does."""
    if isinstance(attention, Region):
        return attention.projection
    # An operator may give its keys and values, too, which other layers read.
    following = readers(attention.core.outputs[0]) if attention.core is not None else ()
    return following[0] if len(following) == 1 else None


def _named(block: Mlp, branch: Branch, attentions: Sequence[Region | Refusal]) -> Region | Refusal:
    """The MLP ``block``, which the ``branch`` is."""
    assert isinstance(branch, Region)
    if not branch.inputs:
        return Refusal(block, "one tensor is read by the whole MLP", "none")
    if branch.linear_nodes:
        return replace(branch, layer=block)
    # Experts may lie in one operator that is no product of the table: W is then stored as the attention's weights are.
    known = {a.layer: a.projection for a in attentions if isinstance(a, Region) and isinstance(a.layer, int)}
    near = known[min(known, key=lambda layer: abs(layer - block.layer))]
    return replace(branch, layer=block, projection=near, core=near.op_type)


class _Flow:
    """The nodes that activations pass through on their way to the logits, in order.

    A graph that reads ``embeddings`` has None before the first node: what makes them. With ``behind``, only what
    depends on the first output of that node passes.
    """

    def __init__(self, search: Search, embeddings: ir.Value | None, behind: ir.Node | None = None) -> None:
        self.activations = set(search.activations)
        self.order: dict[Any, int] = {None: -1, **search.order}
        self._given = () if embeddings is None else (embeddings,)
        if behind is not None:
            start = behind.outputs[0]
            self.activations &= {start, *(v for node in reach([start]) for v in node.outputs)}
        self.activations |= set(self._given)
        makers = {v.producer() for v in self.activations}
        nodes = sorted(search.before_logits & makers, key=self.order.__getitem__)
        self.nodes: list[ir.Node | None] = [*[None] * len(self._given), *nodes]
        self._inputs = {
            n: [v for v in (*n.inputs, *captured(n)) if v is not None and v in self.activations]
            for n in nodes
        }

    def made(self, node: ir.Node | None) -> Sequence[ir.Value]:
        """What ``node`` makes."""
        return self._given if node is None else node.outputs

    def inputs(self, node: ir.Node | None) -> list[ir.Value]:
        """The activations that ``node`` reads."""
        return self._inputs.get(node, []) if node is not None else []

    def before(self, value: ir.Value, start: ir.Node | None) -> list[ir.Node]:
        """The nodes on a path from the node ``start`` to ``value``, in order; ``start`` is not among them."""
        above: set[ir.Node] = set()
        stack = [value.producer()]
        while stack:
            node = stack.pop()
            if node is not None and node not in above and self.order.get(node, -1) > self.order[start]:
                above.add(node)
                stack += [v.producer() for v in self.inputs(node)]
        below: set[ir.Node | None] = {start}
        between = []
        for node in sorted(above, key=self.order.__getitem__):
            if any(v.producer() in below for v in self.inputs(node)):
                below.add(node)
                between.append(node)
        return between

    def passed(self, nodes: Sequence[ir.Node | None], start: ir.Node | None) -> list[ir.Node | None]:
        """Those of ``start`` and ``nodes`` that all of it passes through, in order: no edge goes past them."""
        last = {value: place for place, node in enumerate(nodes) for value in self.inputs(node)}
        found, farthest = [], -1
        for place, node in enumerate((start, *nodes)):
            if farthest <= place:
                found.append(node)
            farthest = max([farthest, *(last.get(v, -1) + 1 for v in self.made(node))])
        return found

    def sums(self, node: ir.Node | None) -> bool:
        """Whether ``node`` adds activations alone."""
        return node is not None and node.op_type == "Add" and all(v in self.activations for v in node.inputs)


def _added(flow: _Flow, regions: Sequence[Region | Refusal]) -> Iterator[Branch]:
    """What is added to the stream of ``flow``, in order."""
    projections = {r.projection: r.layer for r in regions if isinstance(r, Region)}
    for before, add in pairwise(flow.passed(flow.nodes[1:], flow.nodes[0]) if flow.nodes else ()):
        if add is not None and (key(add) in SKIP_NORMS or add.op_type == "Add"):
            yield from _branches(flow, before, add, projections)


def _terms(flow: _Flow, add: ir.Node, before: ir.Node | None) -> tuple[list[ir.Value], ir.Value | None]:
    """The sums and terms that ``add`` adds to the stream, and the stream; none if it adds none to it."""
    sums: list[ir.Value] = []

    def is_stream(value: ir.Value) -> bool:
        while (maker := value.producer()) is not before:
            if maker is None or not (maker.op_type in VIEWS or _scales(maker)):
                return False
            value = next(v for v in maker.inputs if v is not None and not is_constant(v))
        return True

    def stream_in(node: ir.Node) -> ir.Value | None:
        """The stream among the terms of the sum ``node``; the others of a sum that has it are put into ``sums``."""
        stream, others = None, []
        for value in (v for v in node.inputs[:2] if v is not None and v in flow.activations):
            maker, within = value.producer(), None
            if is_stream(value):
                stream = value
            elif maker is not None and flow.sums(maker) and len(readers(value)) == 1:
                within = stream_in(maker)
            stream = within or stream
            if within is None and stream is not value:
                others.append(value)
        if stream is not None or node is add:
            sums.extend(others)
        return stream

    stream = stream_in(add)
    # A sum of branches may be y itself, as that of routed and shared experts, or two branches side by side.
    for value in sums:  # which grows
        if len(sums) < _MAX_TERMS and flow.sums(maker := value.producer()):
            sums += [v for v in maker.inputs[:2] if v is not None]  # type: ignore[union-attr]
    return (sums, stream) if stream is not None else ([], None)


def _scales(node: ir.Node) -> bool:
    return node.op_type in ("Mul", "Div") and any(is_constant(v) for v in node.inputs)


def _branches(
    flow: _Flow, before: ir.Node | None, add: ir.Node, projections: dict[ir.Node, Block]
) -> Iterator[Branch]:
    terms, stream = _terms(flow, add, before)
    attentions: dict[Block, None] = {}
    inputs: dict[ir.Value, None] = {}
    outputs: dict[Output, None] = {}
    linear: dict[ir.Node, None] = {}
    count, bias = 0, later_bias(add)
    for term in terms:
        nodes = flow.before(term, before)
        if own := [projections[node] for node in nodes if node in projections]:
            attentions |= dict.fromkeys(own)
            continue
        u, y = _candidates(flow, nodes, before, term)
        inputs |= dict.fromkeys(u)
        outputs |= {Output(one.value, bias, one.biases + 1): None for one in y if bias is not None}
        outputs |= dict.fromkeys(y)
        linear |= dict.fromkeys(node for node in nodes if linear_op(node))
        count = max(count, len(nodes))
    yield from (layer for layer in attentions if isinstance(layer, int))
    if 0 < len(outputs) <= _MAX_CANDIDATES:
        streams, ends = (() if stream is None else (stream,)), list(linear) or [add]
        found = tuple(inputs), streams, tuple(outputs), ends[-1], tuple(linear), ends[0].op_type, count
        yield Region(_UNNAMED, *found)


def _candidates(
    flow: _Flow, nodes: Sequence[ir.Node], before: ir.Node | None, term: ir.Value
) -> tuple[list[ir.Value], list[Output]]:
    """The candidates for u and y of the branch with the ``term``, most likely first."""
    read = {value for node in nodes for value in flow.inputs(node)} | {term}
    first = next((i for i, node in enumerate(nodes) if linear_op(node)), len(nodes))
    u: list[ir.Value] = []
    y: list[Output] = []
    biases = 0
    for node in flow.passed(nodes, before):
        values = [v for v in flow.made(node) if v in read]
        if node is before or node is None or nodes.index(node) < first:
            u += values
            continue
        biases += node.op_type == "Add" and any(is_constant(v) for v in node.inputs)
        if node.op_type not in _COPIES:
            y += [Output(v, biases=biases) for v in values]
    # In another shape last: the shape that y gets back may be computed from what lies in between, which would stay.
    latest = u[::-1]
    return sorted(latest, key=lambda v: (m := v.producer()) is not None and m.op_type in _RESHAPES), y[::-1]
