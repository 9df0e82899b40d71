"""Leave an attention or an MLP out of a graph, and the KV pairs of layers that have no attention any more.

What adds the output y of a layer takes the other summand alone:

    before                                  after
    h ─► norm ─► … ─► y ─► Add(h, y) ─► h'  h ─► h'

On its way to the sum, y may be cast, scaled, or go through a norm without a bias: zeros stay zeros. A sum and a norm in
one operator of onnxruntime becomes the norm alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import onnx_ir as ir

from nbl_export.batch import EMBEDDINGS, MASK, TOKENS
from nbl_export.blocks import Block, described
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import KVPair, state_pairs
from nbl_export.graph.cores import roles
from nbl_export.graph.io import int64_initializer
from nbl_export.graph.operators import MICROSOFT, SKIP_NORMS, is_constant, key, readers, remove_unused

# Operators of ONNX whose output is zeros where their first input is.
_ZEROS_STAY = frozenset(
    {"Cast", "Identity", "Dropout", "Neg", "Div", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}
    | {"RMSNormalization", "SimplifiedLayerNormalization"}
)
# Of a sum and a norm in one operator: the norm alone, in ONNX and before ONNX had it, the opset that has it first, and
# how many inputs of it follow the two summands.
_NORMS = {
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        23,
        1,
    ),
    (MICROSOFT, "SkipLayerNormalization"): ("LayerNormalization", "LayerNormalization", 17, 2),
}
_NUMBER = re.compile(r"(\d+)")
_SUM = 3  # the output of such an operator that is the sum


def leave_out(model: ir.Model, layer: Block, y: ir.Value, later: ir.Value | None = None) -> None:
    """Leave out what writes ``y``, the output of ``layer``, in place; ``later`` is a bias that is added to it.

    Raises :class:`InputError` where the output is not simply added to the residual stream.
    """
    zeros = [y]
    for value in zeros:  # which grows
        for use in tuple(value.uses()):
            zeros += _without(use.node, value, later, model.opset_imports[""])
    remove_unused(model)
    producer = y.producer()
    if producer is not None and producer.graph is not None and (y.uses() or y.is_graph_output()):
        reader = next((use.node for use in y.uses()), None)
        by = f"{reader.op_type} ({reader.name})" if reader else "the graph, as an output"
        raise InputError(
            f"{described(layer)} cannot be dropped: its output is not simply added to the residual stream, but read by "
            f"{by}."
        )


def _without(node: ir.Node, zero: ir.Value, later: ir.Value | None, opset: int) -> Sequence[ir.Value]:
    """Take ``zero`` out of the sum that ``node`` is; returns what else is zeros with it."""
    domain, op = key(node)
    if (domain, op) in SKIP_NORMS:
        _norm_alone(node, zero, later, opset)
    elif not domain and (op == "Mul" or (op in _ZEROS_STAY and node.inputs[0] is zero)):
        return node.outputs
    elif not domain and op == "Add":
        other = next((v for v in node.inputs if v is not zero), None)
        if other is None or (is_constant(other) and other is later):  # added to itself, or its own bias
            return node.outputs
        if not is_constant(other):
            node.outputs[0].replace_all_uses_with(other, replace_graph_outputs=True)
    return ()


def _norm_alone(node: ir.Node, zero: ir.Value, later: ir.Value | None, opset: int) -> None:
    op, before, since, own = _NORMS[key(node)]
    at = SKIP_NORMS[key(node)]
    bias = node.inputs[at] if len(node.inputs) > at else None
    other = next((v for v in node.inputs[:2] if v is not zero), None)
    # The bias that is added with y is a part of it; any other would be left out wrongly.
    if other is None or zero not in node.inputs[:2] or (bias is not None and bias is not later):
        return
    attributes = {"epsilon": node.attributes["epsilon"].as_float()} if "epsilon" in node.attributes else {}
    norm = ir.node(
        op if opset >= since else before,
        [other, *node.inputs[2 : 2 + own]],
        {"axis": -1, **attributes},
        name=node.name,
        num_outputs=1,
    )
    node.prepend(norm)
    old, new = node.outputs[0], norm.outputs[0]
    # The name, too, by which proofs know the tensor: the operator that had it goes.
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if len(node.outputs) > _SUM:
        node.outputs[_SUM].replace_all_uses_with(other, replace_graph_outputs=True)


def remove_pairs(model: ir.Model, removed: Collection[int], pairs: Sequence[KVPair]) -> None:
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
    graph = model.graph
    gone, retained = ([p for p in pairs if (p.index in removed) is out] for out in (True, False))
    places = _places(pairs)
    for value in (v for pair in gone for v in pair.present):
        graph.outputs.remove(value)
    remove_unused(model)
    for pair in gone:
        for number, value in enumerate((*pair.past, *pair.present)):
            twin = (*retained[0].past, *retained[0].present)[number] if retained else None
            for usage in [usage for one in _of_one_shape(value) for usage in one.uses()]:
                if usage.node.op_type == "Shape" and twin is not None:
                    usage.node.replace_input_with(0, twin)
                elif usage.node.op_type == "Shape":
                    _compute_shape(model, usage.node, pair.geometry(number % 2), grown=number > 1)
    remove_unused(model)
    for value in (v for pair in gone for v in pair.past):
        if left := [f"{u.node.op_type} ({u.node.name})" for u in value.uses()]:
            raise BuildError(f"{value.name} cannot be removed: a {left[0]} still reads it.")
        graph.inputs.remove(value)
    if not places:
        return
    states = [v for pair in state_pairs(model) for v in (pair.past, pair.present)]
    numbers = {_NUMBER.split(str(value.name))[1] for value in states if _NUMBER.search(str(value.name))}
    nothing_left = [pair.index for pair in gone if str(pair.index) not in numbers]
    kept = [(v, place) for p in retained for v, place in zip((*p.past, *p.present), places, strict=True)]
    for value, place in (*kept, *((value, 1) for value in states)):
        parts = _NUMBER.split(str(value.name))
        if len(parts) > place:
            number = int(parts[place])
            parts[place] = str(number - sum(other < number for other in nothing_left))
        value.name = "".join(parts)


def _of_one_shape(value: ir.Value) -> list[ir.Value]:
    """``value`` and what has its shape by the operators that read it: a Cast, a Concat of it alone …"""
    found = [value]
    for one in found:
        for node in readers(one):
            alone = node.op_type == "Concat" and len(node.inputs) == 1
            if alone or node.op_type in ("Cast", "CastLike", "Identity"):
                found.append(node.outputs[0])
    return found


def _places(pairs: Sequence[KVPair]) -> list[int]:
    """Which part of the names of past key, past value, present key and present value is the pair's number.

    Empty if the names do not contain the numbers 0, 1, 2 …: such pairs cannot be renumbered.
    """
    places = []
    for values in zip(*((*p.past, *p.present) for p in pairs), strict=True):
        names = [(str(p.index), _NUMBER.split(str(v.name))) for p, v in zip(pairs, values, strict=True)]
        some = range(1, min(len(parts) for _, parts in names), 2)
        own = [place for place in some if all(parts[place] == number for number, parts in names)]
        if not own:
            return []
        places.append(own[0])
    return places


def _compute_shape(model: ir.Model, node: ir.Node, geometry: tuple[int, int], grown: bool) -> None:
    """Compute what a ``Shape`` of a removed cache says: [batch, heads, length, head_dim]."""
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
    dimensions = [dimension(tokens, 0), constant(heads), length, constant(size)]
    start, stop = (node.attributes[n].as_int() if n in node.attributes else None for n in ("start", "end"))
    result = emit("Concat", dimensions[start:stop], axis=0)
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
