"""Find the attention of every layer in a decoder or encoder graph, by structure alone.

    h ─► norm ─► x ─► MatMul q,k,v ─► … ─► core ─► … ─► MatMul o ─► (+ bias) ─► y ─► Add ─► …
                                            ▲│                                       ▲
                              past key/value┘└► present key/value             h ─────┘

1. The core is the node where tokens are mixed (:mod:`.cores`).
2. y is the output of the first linear operator (:data:`~.operators.LINEAR`) after the core. Its bias may be
   added by that node, by the next, or inside a fused residual norm, with views in between. Each of these
   tensors is a candidate.
3. x is the one activation that all linear operators before the core read, or a view of it. A low-rank
   projection (queries, keys and values are compressed, and a second projection expands them to heads) is
   followed back to the input of the first. Positions and masks also reach the core but are not activations.
4. h, the residual stream before the norm, is the other input of the addition of y, or the input of the norm.

A layer that does not match becomes a :class:`Refusal` with the failed check and what was found. Which
candidate is the right one, if any, is then proven numerically (:mod:`nbl_export.rewrite.prove`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.blocks import Block, described
from nbl_export.errors import InputError
from nbl_export.graph.cache import KV_LAYERS_KEY, kv_pairs
from nbl_export.graph.cores import Core, NotFound, Search, core_of, cores_of, visible_cores
from nbl_export.graph.operators import (
    INTEGER_PRODUCTS,
    PRODUCTS,
    QUANTIZE,
    SKIP_NORMS,
    VIEWS,
    fused_op,
    is_constant,
    key,
    linear_op,
    readers,
)

_MAX_STEPS = 12
_MAX_ADDS = 3
_MAX_STAGES = 6  # queries, keys and values through two projections each


@dataclass(frozen=True)
class Output:
    """A tensor that may be y. ``later`` is a bias that a fused residual norm adds to it afterwards.

    ``biases`` counts the constants added to the product of the projection, including ``later``.
    """

    value: ir.Value
    later: ir.Value | None = None
    biases: int = 0


@dataclass(frozen=True)
class Region:
    """One attention or MLP in a graph: the candidates for x, h and y, most likely first.

    ``projection`` is the output projection, which writes y; ``linear_nodes`` are all linear operators from x to y;
    ``core`` is the operator that mixes tokens, or the first of an MLP; ``ops`` counts the nodes in between. ``pair`` is
    the number of its own KV pair, None without one; ``lent`` are keys and values of another layer that it attends to.
    """

    layer: Block
    inputs: tuple[ir.Value, ...]
    streams: tuple[ir.Value, ...]
    outputs: tuple[Output, ...]
    projection: ir.Node
    linear_nodes: tuple[ir.Node, ...]
    core: str
    ops: int
    pair: int | None = None
    lent: tuple[ir.Value, ...] = ()

    @property
    def style(self) -> str:
        """How the exporter wrote it: the name of a fused operator, or "decomposed"."""
        return "decomposed" if self.core in PRODUCTS else self.core


@dataclass(frozen=True)
class Refusal:
    """Why no rewritable attention or MLP was found for a layer; ``core`` mixes its tokens, where that is known."""

    layer: Block
    check: str
    found: str
    pair: int | None = None
    core: ir.Node | None = None

    def __str__(self) -> str:
        return f"{described(self.layer)}: {self.check} (found: {self.found})"


def find_regions(model: ir.Model) -> list[Region | Refusal]:
    """One entry for each attention layer of the graph, in order.

    Raises :class:`InputError` for a graph whose layers lie in the branches of an If or the body of a loop.
    """
    pairs, visible = kv_pairs(model), visible_cores(model)
    cores = cores_of(pairs, visible)
    if not visible and KV_LAYERS_KEY not in model.metadata_props:  # otherwise all layers are linear already
        _refuse_control_flow(model)
    search = Search(model)
    found: list[Region | Refusal] = []
    for number, core in enumerate(cores):
        layer = core.pair if core.pair is not None and len(cores) == len(pairs) else number
        known = core.node if isinstance(core.node, ir.Node) else None
        try:
            if core.read_by:
                readers = ", ".join(map(str, core.read_by))
                raise NotFound("no other layer reads its keys and values", f"read by {readers}")
            node = core.node if isinstance(core.node, ir.Node) else core_of(search, core.node)
            found.append(_region(layer, core, node, search))
        except NotFound as reason:
            found.append(Refusal(layer, reason.check, reason.found, core.pair, known))
    return found


def _refuse_control_flow(model: ir.Model) -> None:
    for node in model.graph:
        if any(not a.is_ref() and a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            raise InputError(
                f"The graph's layers are inside a {node.op_type} ({node.name}), as in a merged decoder: "
                "rewrite the decoder without branches instead."
            )


def _region(layer: int, core: Core, node: ir.Node, search: Search) -> Region:
    activations = search.activations - set(core.lent)
    last, outputs = _outputs(node)
    inputs, linear, ops = _inputs(node, last, search, activations)
    streams = _streams(outputs[0].value, inputs, search.activations)
    return Region(
        layer, inputs, streams, outputs, last, (*linear, last), node.op_type, ops, core.pair, core.lent
    )


# 2 -----------------------------------------------------------------------------------------------


def _outputs(core: ir.Node) -> tuple[ir.Node, tuple[Output, ...]]:
    """The output projection, and the candidates for y, last tensor of the chain first."""
    node = core
    for _ in range(_MAX_STEPS):
        following = readers(node.outputs[0])
        if len(following) != 1:
            raise NotFound(
                "the attention's result has one reader up to the output projection", f"{len(following)}"
            )
        node = following[0]
        if linear_op(node):
            return node, _candidates(_scaled(node) if node.op_type in INTEGER_PRODUCTS else node.outputs[0])
        if node.op_type == "Add" and not any(is_constant(v) for v in node.inputs):
            raise NotFound(
                "an output projection comes before the residual addition", "an Add of two activations"
            )
    raise NotFound("an output projection follows the attention", f"{node.op_type} after {_MAX_STEPS} nodes")


def _scaled(product: ir.Node) -> ir.Value:
    """The dequantized result of an integer product: cast, and multiplied by the scales of both factors."""
    value = product.outputs[0]
    for op in ("Cast", "Mul"):
        found = [node.op_type for node in readers(value)]
        if found != [op]:
            raise NotFound("an integer product is cast and scaled", ", ".join(found) or "nothing")
        value = readers(value)[0].outputs[0]
    return value


def _candidates(value: ir.Value) -> tuple[Output, ...]:
    found, biases = [Output(value)], 0
    while len(following := readers(value)) == 1:
        node = following[0]
        if (bias := later_bias(node)) is not None:
            found.append(Output(value, bias, biases + 1))
        if not (_adds_constant(node, value) or node.op_type in VIEWS):
            break
        biases += node.op_type not in VIEWS
        value = node.outputs[0]
        # The Cast to float32 of a half-precision graph is not the attention's output.
        if node.op_type != "Cast":
            found.append(Output(value, biases=biases))
    # Without its bias the tensor is not y, and 4-bit weights may be too inaccurate to show it.
    biased = [n for n in following if len(following) > 1 and (_adds_constant(n, value) or later_bias(n))]
    if biased:
        raise NotFound("the output projection's bias is added once", f"{len(biased)} x {biased[0].op_type}")
    return tuple(reversed(found))


def _adds_constant(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "Add" and is_constant(_other(node, value))


def later_bias(node: ir.Node) -> ir.Value | None:
    """The bias that a fused residual norm adds to its two inputs, if ``node`` is one and has it."""
    index = SKIP_NORMS.get(key(node))
    return node.inputs[index] if index is not None and len(node.inputs) > index else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


# 3 -----------------------------------------------------------------------------------------------


def _inputs(
    core: ir.Node, projection: ir.Node, search: Search, activations: set[ir.Value]
) -> tuple[tuple[ir.Value, ...], list[ir.Node], int]:
    """The candidates for x, the linear operators that read it, and the number of nodes from there on."""
    seen: set[ir.Node] = {projection}
    linear_nodes: list[ir.Node] = []

    def before(value: ir.Value) -> set[ir.Value]:
        """The inputs of the nearest linear operators (and quantizations) that ``value`` is computed from."""
        direct: set[ir.Value] = set()
        passed: set[ir.Node] = set()
        stack: list[ir.Value | None] = [value]
        while stack:
            current = stack.pop()
            node = current.producer() if current is not None and current in activations else None
            if node is None or node in passed:
                continue
            passed.add(node)
            op = fused_op(node) if node is core else None
            if linear_op(node) or node.op_type == QUANTIZE or (op and op.weights is not None):
                assert node.inputs[0] is not None
                direct.add(node.inputs[0])
                if node.op_type != QUANTIZE and node not in linear_nodes:
                    linear_nodes.append(node)
            else:
                stack.extend(node.inputs)
        seen.update(passed)
        return direct

    assert projection.inputs[0] is not None
    # The projection's own input may be quantized; any other quantization node reads x.
    direct = first = before(_origin(projection.inputs[0]))
    for _ in range(_MAX_STAGES):
        origins = {_origin(v) for v in direct}
        if len(origins) < 2:
            break
        # x precedes everything computed from it, so the last of them is not x but an intermediate projection.
        last = max(origins, key=search.made_at)
        if not (earlier := before(last)):
            break
        direct = {v for v in direct if _origin(v) is not last} | earlier
    if len(origins) != 1:
        names = ", ".join(sorted(str(v.name) for v in first)) or "none"
        raise NotFound("all projections of the layer read one tensor", names)
    # Quantized values are not activations: a candidate is the tensor before quantization.
    plain = [v for v in direct if (maker := v.producer()) is None or maker.op_type != QUANTIZE]
    candidates = [*origins, *(plain if len(plain) == 1 else ())]
    # In a half-precision graph a float32 norm is read through a Cast, whose output has the projections' dtype.
    if len(plain) == 1 and (node := plain[0].producer()) is not None and node.op_type == "Cast":
        candidates.reverse()
    return tuple(dict.fromkeys(candidates)), linear_nodes, len(seen)


def _origin(value: ir.Value) -> ir.Value:
    """The tensor that ``value`` is a view of, or was quantized from."""
    node = value.producer()
    while node is not None and node.op_type in (*VIEWS, QUANTIZE) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


# 4 -----------------------------------------------------------------------------------------------


def _streams(y: ir.Value, inputs: tuple[ir.Value, ...], activations: set[ir.Value]) -> tuple[ir.Value, ...]:
    found: dict[ir.Value, None] = {}
    value: ir.Value | None = y
    for _ in range(_MAX_ADDS):
        while value is not None and len(following := readers(value)) == 1 and following[0].op_type in VIEWS:
            value = following[0].outputs[0]
        following = readers(value) if value is not None else []
        if value is None or len(following) != 1:
            break
        add = following[0]
        if add.op_type != "Add" and key(add) not in SKIP_NORMS:
            break
        other = _other(add, value)
        if other is not None and other in activations:
            found[other] = None
        value = add.outputs[0] if add.op_type == "Add" else None
    for x in inputs:
        found |= _before_norm(x, activations)
    return tuple(found)


def _before_norm(x: ir.Value, activations: set[ir.Value]) -> dict[ir.Value, None]:
    """Possible inputs of the norm that writes x: a few steps back, not past a linear operator; x itself last."""
    found: dict[ir.Value, None] = {}
    level = [x]
    for _ in range(_MAX_STEPS):
        nodes = [n for v in level if (n := v.producer()) is not None and not linear_op(n)]
        level = [v for n in nodes for v in n.inputs if v is not None and v in activations and v not in found]
        found |= dict.fromkeys(level)
        # A fused residual norm returns the sum as its last output.
        found |= dict.fromkeys(n.outputs[-1] for n in nodes if key(n) in SKIP_NORMS and len(n.outputs) > 1)
    return found | {x: None}
