"""Leave an attention or an MLP out of a graph: what adds its output y takes the other summand alone.

    before                                  after
    h ─► norm ─► … ─► y ─► Add(h, y) ─► h'  h ─► h'

On its way to the sum, y may be cast, scaled, or go through a norm without a bias: zeros stay zeros. A sum and a norm in
one operator of onnxruntime becomes the norm alone.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nbl_export.blocks import Block, described
from nbl_export.errors import InputError
from nbl_export.graph.operators import MICROSOFT, SKIP_NORMS, is_constant, key

# Operators whose output is zeros where their first input is.
_ZEROS_STAY = frozenset(
    ("", op)
    for op in (
        "Cast",
        "Identity",
        "Dropout",
        "Neg",
        "Div",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
    )
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
_SUM = 3  # the output of such an operator that is the sum


def leave_out(model: ir.Model, layer: Block, y: ir.Value, later: ir.Value | None = None) -> None:
    """Leave out what writes ``y``, the output of ``layer``, in place; ``later`` is a bias that is added to it.

    Raises :class:`InputError` where the output is not simply added to the residual stream.
    """
    zeros = [y]
    for value in zeros:  # which grows
        for use in tuple(value.uses()):
            zeros += _without(use.node, value, later, model.opset_imports[""])
    RemoveUnusedNodesPass()(model)
    producer = y.producer()
    if producer is not None and producer.graph is not None and (y.uses() or y.is_graph_output()):
        reader = next((use.node for use in y.uses()), None)
        by = f"{reader.op_type} ({reader.name})" if reader else "the graph, as an output"
        raise InputError(
            f"{described(layer)} cannot be dropped: its output is not simply added to the residual stream, but read by "
            f"{by}."
        )


def _without(node: ir.Node, zero: ir.Value, later: ir.Value | None, opset: int) -> list[ir.Value]:
    """Take ``zero`` out of the sum that ``node`` is; returns what else is zeros with it."""
    if key(node) == ("", "Add"):
        other = next((v for v in node.inputs if v is not zero), None)
        if other is None:  # added to itself
            return [node.outputs[0]]
        if is_constant(other):
            return [node.outputs[0]] if later is not None and other is later else []
        node.outputs[0].replace_all_uses_with(other, replace_graph_outputs=True)
    elif key(node) in SKIP_NORMS:
        _norm_alone(node, zero, later, opset)
    elif key(node) == ("", "Mul") or (key(node) in _ZEROS_STAY and node.inputs[0] is zero):
        return [node.outputs[0]]
    return []


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
