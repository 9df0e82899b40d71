"""Find what a plan replaces in a graph: its attentions and MLPs, with the numbers of the model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.batch.names import PIXELS
from nbl_export.blocks import attentions
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.branches import mlp_regions
from nbl_export.graph.operators import SKIP_NORMS, key, linear_op
from nbl_export.graph.regions import Refusal, Region
from nbl_export.linearize.plan import Plan, linear_name

# The bits of an exponent that is all ones: infinity, or with other bits NaN.
_EXPONENT: dict[ir.DataType, np.uint16 | np.uint32] = {
    ir.DataType.FLOAT: np.uint32(0x7F800000),
    ir.DataType.FLOAT16: np.uint16(0x7C00),
    ir.DataType.BFLOAT16: np.uint16(0x7F80),
}
_PART = 1 << 22  # numbers that are looked at together


def check_finite(model: ir.Model, where: str) -> None:
    """Raise :class:`InputError` if a weight of ``model`` is NaN, or infinite where it multiplies (masks add it)."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _EXPONENT:
            continue
        bits = _EXPONENT[tensor.dtype]
        flat = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(bits.dtype)
        parts = (flat[at : at + _PART] for at in range(0, flat.size, _PART))
        bad = sum(int(((part & bits) == bits).sum()) for part in parts)
        nan = bool(bad) and bool(np.isnan(tensor.numpy().astype(np.float32)).any())
        readers = [use.node for use in value.uses()] if bad else []
        if nan or any(linear_op(n) or key(n) in SKIP_NORMS or "Norm" in n.op_type for n in readers):
            raise InputError(
                f"{where} cannot be used: its weight {value.name} is {'NaN' if nan else 'infinite'} at {bad:,} of "
                f"{flat.size:,} places; export it from a sound model."
            )


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
    made = (v.name for node in model.graph for v in node.outputs)
    for name in (*model.graph.initializers, *made):
        if name and name.startswith(ours):
            raise InputError(
                f"The graph already has a tensor {name}, a name that the rewrite needs: rename it."
            )
    entries: list[Region | Refusal]
    entries = [replace(other, layer=layer) for layer, other in zip(layers, found, strict=True)]  # type: ignore[arg-type]
    _check(entries, plan)
    return entries


def planned_mlps(model: ir.Model, planned: Sequence[Region | Refusal], plan: Plan) -> list[Region]:
    """The MLPs of the graph, if the plan replaces any."""
    if len(plan.linear_attention) == len(plan.chosen):
        return []
    entries = mlp_regions(model, planned, plan.candidates, plan.layer_count)
    _check(entries, plan)
    return [entry for entry in entries if isinstance(entry, Region)]


def _check(entries: Iterable[Any], plan: Plan) -> None:
    for entry in entries:
        if isinstance(entry, Refusal) and entry.layer in set(plan.chosen):
            raise BuildError(f"The graph cannot be rewritten: {entry}.")
