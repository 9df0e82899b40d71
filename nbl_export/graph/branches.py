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

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from nbl_export.batch.names import EMBEDDINGS
from nbl_export.blocks import Block, Mlp
from nbl_export.graph.cores import Search
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
from nbl_export.graph.regions import (
    AttentionRegion,
    MlpRegion,
    Output,
    Refusal,
    later_bias,
    search_of,
)
from nbl_export.graph.roles import roles

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


@dataclass(frozen=True)
class Branch:
    """What one addition to the residual stream adds: an ``attention`` (by its number), or tensors of something else.

    ``inputs`` and ``outputs`` are the candidates for u and y, most likely first, ``stream`` is h, ``linear_nodes``
    are the linear operators in between, ``nodes`` the number of all.
    """

    attention: int | None
    inputs: tuple[ir.Value, ...] = ()
    outputs: tuple[Output, ...] = ()
    stream: ir.Value | None = None
    linear_nodes: tuple[ir.Node, ...] = ()
    nodes: int = 0


def find_branches(model: ir.Model, regions: Sequence[AttentionRegion]) -> list[Branch]:
    """The branches of the graph, in order; ``regions`` are its attentions, of which those that were found are known."""
    flow = _Flow(search_of(model), roles(model).get(EMBEDDINGS))
    return list(_added(flow, _projections(regions)))


def _projections(attentions: Iterable[AttentionRegion | Refusal[int]]) -> dict[ir.Node, int]:
    """The layers of those attentions that were found, by what writes their outputs."""
    return {a.projection: a.layer for a in attentions if isinstance(a, AttentionRegion)}


def _added(flow: _Flow, projections: dict[ir.Node, int]) -> Iterator[Branch]:
    """What is added to the stream of ``flow``, in order."""
    for before, add in _additions(flow):
        yield from _branches(flow, before, add, projections)


class _Flow:
    """The nodes that activations pass through on their way to the logits, in order."""

    def __init__(self, search: Search, embeddings: ir.Value | None, behind: ir.Node | None = None) -> None:
        """``embeddings`` are the input of a graph that reads embeddings: its stream starts there. With ``behind``, only
        what depends on the first output of that node passes.
        """
        self.activations, self.order = set(search.activations), dict(search.order)
        if behind is not None:
            self.activations &= _depending(behind.outputs[0])
        makers = {v.producer() for v in self.activations}
        self.nodes = sorted((n for n in search.before_logits if n in makers), key=self.order.__getitem__)
        # A stream starts at a node: one that is not in the graph stands for what made the embeddings.
        self._source = ir.node("Identity", [], num_outputs=0)
        self._given = () if embeddings is None else (embeddings,)
        if embeddings is not None:
            self.activations.add(embeddings)
            self.nodes.insert(0, self._source)
            self.order[self._source] = -1
        self._inputs = {n: self._read(n) for n in self.nodes}

    def maker(self, value: ir.Value) -> ir.Node | None:
        """The node that ``value`` comes from."""
        return self._source if value in self._given else value.producer()

    def made(self, node: ir.Node) -> Sequence[ir.Value]:
        """What ``node`` makes."""
        return self._given if node is self._source else node.outputs

    def _read(self, node: ir.Node) -> list[ir.Value]:
        return [v for v in (*node.inputs, *captured(node)) if v is not None and v in self.activations]

    def inputs(self, node: ir.Node) -> list[ir.Value]:
        """The activations that ``node`` reads."""
        return self._inputs.get(node, [])

    def before(self, value: ir.Value, start: ir.Node) -> list[ir.Node]:
        """The nodes on a path from the node ``start`` to ``value``, in order; ``start`` is not among them."""
        above: set[ir.Node] = set()
        least = self.order[start]
        stack = [self.maker(value)]
        while stack:
            node = stack.pop()
            if node is None or node in above or self.order.get(node, -1) <= least:
                continue
            above.add(node)
            stack += [self.maker(v) for v in self.inputs(node)]
        below: set[ir.Node] = {start}
        between = []
        for node in sorted(above, key=self.order.__getitem__):
            if any(self.maker(v) in below for v in self.inputs(node)):
                below.add(node)
                between.append(node)
        return between

    def passed(self, nodes: Sequence[ir.Node], start: ir.Node) -> list[ir.Node]:
        """Those of ``start`` and ``nodes`` that all of it passes through, in order: no edge goes past them."""
        last: dict[ir.Value, int] = {}
        for place, node in enumerate(nodes):
            for value in self.inputs(node):
                last[value] = place
        found = []
        farthest = -1
        for place, node in enumerate((start, *nodes)):
            if farthest <= place:
                found.append(node)
            ends = [last.get(v, -1) + 1 for v in self.made(node)]
            farthest = max(farthest, *ends) if ends else farthest
        return found


def _depending(value: ir.Value) -> set[ir.Value]:
    """``value`` and all that is computed from it."""
    found = {value}
    stack = [value]
    while stack:
        new = {v for node in readers(stack.pop()) for v in node.outputs} - found
        found |= new
        stack += new
    return found


def _additions(flow: _Flow) -> Iterable[tuple[ir.Node, ir.Node]]:
    """Each node of the residual stream with the addition that follows it."""
    if not flow.nodes:
        return
    start = flow.nodes[0]
    spine = flow.passed(flow.nodes[1:], start)
    for before, after in pairwise(spine):
        if key(after) in SKIP_NORMS or after.op_type == "Add":
            yield before, after


def _terms(flow: _Flow, add: ir.Node, before: ir.Node) -> tuple[list[ir.Value], ir.Value | None]:
    """The sums and terms that ``add`` adds to the stream, and the stream; none if it adds none to it."""
    sums: list[ir.Value] = []
    stream: ir.Value | None = None

    def is_stream(value: ir.Value) -> bool:
        while (maker := flow.maker(value)) is not before:
            if maker is None or not (maker.op_type in VIEWS or _scales(maker)):
                return False
            value = next(v for v in maker.inputs if v is not None and not is_constant(v))
        return True

    def visit(node: ir.Node, depth: int) -> bool:
        """Whether the stream is among its terms; what is not is put into ``sums``."""
        nonlocal stream
        within = False
        others = []
        for value in node.inputs[:2]:
            if value is None or value not in flow.activations:
                continue
            if is_stream(value):
                within, stream = True, value
                continue
            maker = value.producer()
            inner = maker is not None and _adds_activations(flow, maker) and len(readers(value)) == 1
            if inner and depth < _MAX_TERMS and visit(maker, depth + 1):  # type: ignore[arg-type]
                within = True
            else:
                others.append(value)
        if within or depth == 0:
            sums.extend(others)
        return within

    found = visit(add, 0)
    # A sum of branches may be y itself, as that of routed and shared experts, or two branches side by side.
    for value in list(sums):
        stack = [value]
        while stack and len(sums) < _MAX_TERMS:
            maker = stack.pop().producer()
            if maker is not None and _adds_activations(flow, maker):
                inner = [v for v in maker.inputs[:2] if v is not None]
                sums += inner
                stack += inner
    return (sums, stream) if found else ([], None)


def _adds_activations(flow: _Flow, node: ir.Node) -> bool:
    return node.op_type == "Add" and all(v in flow.activations for v in node.inputs)


def _scales(node: ir.Node) -> bool:
    return node.op_type in ("Mul", "Div") and any(is_constant(v) for v in node.inputs)


def _branches(flow: _Flow, before: ir.Node, add: ir.Node, projections: dict[ir.Node, int]) -> list[Branch]:
    terms, stream = _terms(flow, add, before)
    attentions: dict[int, None] = {}
    inputs: dict[ir.Value, None] = {}
    outputs: dict[Output, None] = {}
    linear: dict[ir.Node, None] = {}
    count = 0
    bias = later_bias(add)
    for term in terms:
        nodes = flow.before(term, before)
        own = [projections[node] for node in nodes if node in projections]
        attentions |= dict.fromkeys(own)
        if own:
            continue
        u, y = _candidates(flow, nodes, before, term)
        inputs |= dict.fromkeys(u)
        outputs |= {Output(one.value, bias, one.biases + 1): None for one in y if bias is not None}
        outputs |= dict.fromkeys(y)
        linear |= dict.fromkeys(node for node in nodes if linear_op(node))
        count = max(count, len(nodes))
    found = [Branch(number) for number in attentions]
    if outputs and len(outputs) <= _MAX_CANDIDATES:
        found.append(Branch(None, tuple(inputs), tuple(outputs), stream, tuple(linear), count))
    return found


def _candidates(
    flow: _Flow, nodes: Sequence[ir.Node], before: ir.Node, term: ir.Value
) -> tuple[list[ir.Value], list[Output]]:
    """The candidates for u and y of the branch with the ``term``, most likely first."""
    passed = flow.passed(nodes, before)
    read = [set(flow.inputs(node)) for node in nodes]
    first = next((i for i, node in enumerate(nodes) if linear_op(node)), len(nodes))
    u: list[ir.Value] = []
    y: list[Output] = []
    biases = 0
    for node in passed:
        place = -1 if node is before else nodes.index(node)
        values = [v for v in flow.made(node) if v is term or any(v in reads for reads in read)]
        if place < first:
            u += values
            continue
        biases += node.op_type == "Add" and any(is_constant(v) for v in node.inputs)
        if node.op_type not in _COPIES:
            y += [Output(v, biases=biases) for v in values]
    # In another shape last: the shape that y gets back may be computed from what lies in between, which would stay.
    latest = u[::-1]
    return sorted(latest, key=_is_reshaped), y[::-1]


def _is_reshaped(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type in _RESHAPES


def mlp_regions(
    model: ir.Model,
    attentions: Sequence[AttentionRegion | Refusal[int]],
    candidates: Collection[Block],
    layers: int,
) -> list[MlpRegion | Refusal[Mlp]]:
    """One entry for each MLP among the ``candidates`` of a model with so many ``layers``, in order.

    ``attentions`` are those of the graph, with the numbers of the model's layers.
    """
    wanted = [block for block in candidates if isinstance(block, Mlp)]
    found = find_branches(model, [a for a in attentions if isinstance(a, AttentionRegion)])
    numbers = {entry.layer for entry in attentions}
    for mixed in _MIXED:
        expected: list[Block | None] = []
        for layer in range(layers):
            own: list[Block] = [Mlp(layer)] if Mlp(layer) in wanted else []
            expected += [layer] if layer in numbers else []
            expected += [None] if mixed(layer in numbers, bool(own)) else []
            expected += own
        if _fits(expected, found):
            pairs = zip(expected, found, strict=True)
            return [
                _mlp_region(block, branch, attentions) for block, branch in pairs if isinstance(block, Mlp)
            ]
    other = sum(branch.attention is None for branch in found)
    what = f"{len(found) - other} attentions and {other} others"
    search = search_of(model)
    starts = {attention.layer: _start(attention) for attention in attentions}
    projections = _projections(attentions)
    behind = {block: _behind(search, starts.get(block.layer), projections) for block in wanted}
    return [
        Refusal(block, "every layer adds its attention and its MLP to one stream", what)
        if branch is None
        else _mlp_region(block, branch, attentions)
        for block, branch in behind.items()
    ]


def _behind(search: Search, start: ir.Node | None, projections: dict[ir.Node, int]) -> Branch | None:
    """The first branch behind the node ``start`` of an attention; None if that is another attention."""
    if start is None:
        return None
    first = next(_added(_Flow(search, None, start), projections), None)
    return first if first is not None and first.attention is None else None


def _start(attention: AttentionRegion | Refusal[int]) -> ir.Node | None:
    """A node that the output of ``attention`` passes through, and nothing else of its layer does."""
    if isinstance(attention, AttentionRegion):
        return attention.projection
    # An operator may give its keys and values, too, which other layers read.
    following = readers(attention.core.outputs[0]) if attention.core is not None else ()
    return following[0] if len(following) == 1 else None


def _fits(expected: Sequence[Block | None], found: Sequence[Branch]) -> bool:
    if len(expected) != len(found):
        return False
    numbers = [block if isinstance(block, int) else None for block in expected]
    return numbers == [branch.attention for branch in found]


def _mlp_region(
    block: Mlp, branch: Branch, attentions: Sequence[AttentionRegion | Refusal[int]]
) -> MlpRegion | Refusal[Mlp]:
    if not branch.inputs:
        return Refusal(block, "one tensor is read by the whole MLP", "none")
    # Experts may lie in one operator that is no product of the table: W is then stored as the attention's weights are.
    near = min(
        (a for a in attentions if isinstance(a, AttentionRegion)), key=lambda a: abs(a.layer - block.layer)
    )
    last = branch.linear_nodes[-1] if branch.linear_nodes else near.projection
    first = branch.linear_nodes[0] if branch.linear_nodes else last
    return MlpRegion(
        block,
        branch.inputs,
        (branch.stream,) if branch.stream is not None else (),
        branch.outputs,
        last,
        branch.linear_nodes,
        first.op_type,
        branch.nodes,
    )
