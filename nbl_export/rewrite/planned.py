"""Find what a plan replaces in a graph: its attentions and MLPs, with the numbers of the model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from nbl_export.batch import PIXELS
from nbl_export.blocks import attentions
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.branches import mlp_regions
from nbl_export.graph.regions import Refusal, Region
from nbl_export.linearize.plan import Plan, linear_name


def planned_attentions(
    model: ir.Model, found: Sequence[Region | Refusal], plan: Plan
) -> list[Region | Refusal]:
    """What was ``found`` in the graph, with the layer indices of the plan."""
    if any(value.name == PIXELS for value in model.graph.inputs):
        found = found[: plan.layer_count]  # an attention after the last layer pools the image
    if not found:
        raise InputError(
            "No attention was found in the graph: it is not a decoder or encoder, or is already rewritten; give the "
            "original graph."
        )
    layers = attentions(plan.candidates)
    # A graph numbers its attention layers only, or all layers of the model, some of which have no attention.
    if tuple(entry.layer for entry in found) not in (layers, tuple(range(len(layers)))):
        raise InputError(
            f"The graph has {len(found)} attention layers, the plan is for {len(layers)}, or numbers "
            "them otherwise: use the graph of the plan's model."
        )
    ours = tuple(f"{linear_name(layer)}." for layer in plan.linear)
    made = (str(v.name) for node in model.graph for v in node.outputs)
    if name := next((n for n in (*model.graph.initializers, *made) if n.startswith(ours)), None):
        raise InputError(f"The graph already has a tensor {name}, a name that the rewrite needs: rename it.")
    return _possible([replace(other, layer=layer) for layer, other in zip(layers, found, strict=True)], plan)


def planned_mlps(model: ir.Model, planned: Sequence[Region | Refusal], plan: Plan) -> list[Region | Refusal]:
    """The MLPs of the graph, if the plan replaces any."""
    if len(plan.linear_attention) == len(plan.chosen):
        return []
    return _possible(mlp_regions(model, planned, plan.candidates, plan.layer_count), plan)


def _possible(entries: list[Region | Refusal], plan: Plan) -> list[Region | Refusal]:
    for entry in entries:
        if isinstance(entry, Refusal) and entry.layer in set(plan.chosen):
            raise BuildError(f"The graph cannot be rewritten: {entry}.")
    return entries
