"""Where a graph has what a plan replaces: its attentions and MLPs, with the numbers of the model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from nbl_export.batch.names import PIXELS
from nbl_export.blocks import attentions
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.branches import mlp_regions
from nbl_export.graph.regions import AttentionRegion, MlpRegion, Refusal
from nbl_export.linearize.plan import Plan, linear_name


def planned_attentions(
    model: ir.Model, found: Sequence[AttentionRegion | Refusal[int]], plan: Plan
) -> list[AttentionRegion | Refusal[int]]:
    """What was ``found`` in the graph, with the layer indices of the plan."""
    if any(value.name == PIXELS for value in model.graph.inputs):
        found = found[: plan.layer_count]  # an attention after the last layer pools the image
    if not found:
        raise InputError(
            "No attention was found in the graph: it is not a decoder or encoder, or is already rewritten; give the "
            "original graph."
        )
    layers = attentions(plan.candidates)
    if len(found) != len(layers):
        raise InputError(
            f"The graph has {len(found)} attention layers, the plan is for {len(layers)}: use the graph of the "
            "plan's model."
        )
    _check_names(model, plan)
    # A graph numbers its attention layers only, or all layers of the model, some of which have no attention.
    numbers = tuple(entry.layer for entry in found)
    if numbers not in (layers, tuple(range(len(layers)))):
        raise InputError(
            f"The graph's KV caches are numbered up to {max(numbers)}, the plan is for {len(layers)} layers: use the "
            "graph of the plan's model."
        )
    entries: list[AttentionRegion | Refusal[int]]
    entries = [replace(other, layer=layer) for layer, other in zip(layers, found, strict=True)]  # type: ignore[arg-type]
    gone = set(plan.chosen)
    for entry in entries:
        if isinstance(entry, Refusal) and entry.layer in gone:
            raise BuildError(f"The graph cannot be rewritten: {entry}.")
    return entries


def planned_mlps(
    model: ir.Model, planned: Sequence[AttentionRegion | Refusal[int]], plan: Plan
) -> list[MlpRegion]:
    """The MLPs of the graph, if the plan replaces any."""
    if len(plan.linear_attention) == len(plan.chosen):
        return []
    entries = mlp_regions(model, planned, plan.candidates, plan.layer_count)
    gone = set(plan.chosen)
    for entry in entries:
        if isinstance(entry, Refusal) and entry.layer in gone:
            raise BuildError(f"The graph cannot be rewritten: {entry}.")
    return [entry for entry in entries if isinstance(entry, MlpRegion)]


def _check_names(model: ir.Model, plan: Plan) -> None:
    ours = tuple(f"{linear_name(layer)}." for layer in plan.linear)
    made = (v.name for node in model.graph for v in node.outputs)
    for name in (*model.graph.initializers, *made):
        if name and name.startswith(ours):
            raise InputError(
                f"The graph already has a tensor {name}, a name that the rewrite needs: rename it."
            )
