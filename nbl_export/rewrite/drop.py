"""The linearized layers dropped from the graph: the baseline that a linearized graph is measured against."""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.linearize.plan import linear_output_name
from nbl_export.rewrite.leave_out import leave_out
from nbl_export.rewrite.replace import linearized_layers


def drop_layers(model: ir.Model) -> None:
    """Drop the linear layers of a rewritten graph, in place: the residual stream bypasses them.

    Raises :class:`InputError` for a graph in which a layer's output is not simply added to the residual stream.
    """
    outputs = {value.name: value for node in model.graph for value in node.outputs}
    for layer in linearized_layers(model):
        leave_out(model, layer, outputs[linear_output_name(layer)])
