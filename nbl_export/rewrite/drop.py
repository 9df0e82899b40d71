"""The linearized layers dropped from the graph: the baseline that a linearized graph is measured against."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nbl_export.errors import InputError
from nbl_export.linearize.plan import linear_output_name
from nbl_export.rewrite.replace import linearized_layers


def drop_layers(model: ir.Model) -> None:
    """Drop the linear layers of a rewritten graph, in place: the residual stream bypasses them.

    Raises :class:`InputError` for a graph in which a layer's output is not simply added to the residual stream.
    """
    outputs = {value.name: value for node in model.graph for value in node.outputs}
    for layer in linearized_layers(model):
        y = outputs.get(linear_output_name(layer))
        adds = [use.node for use in y.uses()] if y is not None else []
        others = [v for node in adds if node.op_type == "Add" for v in node.inputs if v is not y]
        if y is None or len(adds) != 1 or len(others) != 1 or others[0] is None:
            raise InputError(
                f"layer {layer}'s output is not simply added to the residual stream, so it is not dropped"
            )
        adds[0].outputs[0].replace_all_uses_with(others[0], replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)
