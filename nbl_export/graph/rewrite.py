"""Replace planned attention by MatMul + Add in the graph: find, prove, replace, count.

    before                                        after
    h ─► norm ─► q,k,v ─► rope ─► core ─► o ─►+   h ─► norm ─► MatMul(Wᵀ) ─► Add(b) ─►+
    │              past/present K,V           │   │                                   │
    └─────────────────────────────────────────┘   └───────────────────────────────────┘

1. Find (:mod:`.regions`) every layer's u and y; a planned layer without a region is an error.
2. Prove (:mod:`.prove`) them numerically against PyTorch's activations.
3. Replace y by MatMul(u, Wᵀ) + b; remove what is dead, the layers' KV pairs included; renumber.
4. Count: exactly K regions and K KV pairs gone, no dead node or initializer left, the checker and
   strict shape inference pass. Anything else is an error and nothing is written over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import KV_LAYERS_KEY, remove_pairs
from nbl_export.graph.io import GraphSummary, check_file, load_graph, save_graph, summarize
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.prove import PROOF_TOLERANCE, Proof, input_of, prove
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.linearize.plan import LinearLayer, Plan

LAYERS_KEY = "nbl_export.layers"
VERSION_KEY = "nbl_export.version"


@dataclass(frozen=True)
class RewriteResult:
    """What was done: the graph before and after, the proof of each layer, and the files written."""

    before: GraphSummary
    after: GraphSummary
    proofs: dict[int, Proof]
    files: list[Path]


def rewrite_file(source: Path, plan: Plan, target: Path) -> RewriteResult:
    """Rewrite the graph at ``source`` by ``plan`` and write it to ``target``.

    Raises :class:`InputError` if ``source`` is unreadable, already rewritten or of another model, and
    :class:`BuildError` if a planned layer is not found, not proven, or the counts do not come out.
    """
    model = load_graph(source)
    if LAYERS_KEY in model.metadata_props:
        raise InputError(f"{source} is already rewritten: rewrite the original graph instead.")
    before = summarize(model, source)
    regions = _found(model, plan)
    tolerance = PROOF_TOLERANCE[graph_precision(model).name]
    proofs = prove(source, regions, plan, tolerance)
    proven = [r for r in regions if proofs[r.layer].holds(tolerance)]
    replace(model, {r.layer: r for r in proven}, plan)
    _describe(model, proven, plan)

    def check(written: Path) -> None:
        check_file(written)
        result = load_graph(written)
        count(result, before, summarize(result, written), plan)

    files = save_graph(model, target, check)
    return RewriteResult(before, summarize(load_graph(target), target), proofs, files)


def _found(model: ir.Model, plan: Plan) -> list[AttentionRegion]:
    found = find_regions(model)
    if len(found) != plan.layer_count:
        raise InputError(
            f"The graph has {len(found)} attention layers with a KV cache, the plan is for {plan.layer_count}: "
            "it is of another model."
        )
    regions = []
    for entry in found:
        if isinstance(entry, AttentionRegion):
            regions.append(entry)
        elif entry.layer in plan.layers:
            raise BuildError(f"The graph cannot be rewritten: {entry}.")
    return regions


def replace(model: ir.Model, regions: dict[int, AttentionRegion], plan: Plan) -> None:
    """Step 3, in place: planned layers become MatMul + Add, their KV pairs go."""
    for layer in plan.chosen:
        region = regions[layer]
        u = region.x if plan.fit_input == "normed" else region.h
        assert u is not None  # proven regions have their input
        _insert(model, layer, u, region.y, plan.layers[layer])
    RemoveUnusedNodesPass()(model)
    remove_pairs(model, plan.chosen)
    model.graph.sort()


def linear_output_name(layer: int) -> str:
    """The tensor that a linearized layer writes."""
    return f"layers.{layer}.nbl_linear.output"


def _insert(model: ir.Model, layer: int, u: ir.Value, y: ir.Value, linear: LinearLayer) -> None:
    prefix = f"layers.{layer}.nbl_linear"
    dtype = _compute_dtype(u, y, linear)
    if u.dtype != dtype:
        cast = ir.node("Cast", [u], {"to": int(dtype)}, name=f"{prefix}.cast_input")
        nodes, x = [cast], cast.outputs[0]
        x.name, x.type, x.shape = f"{prefix}.input", ir.TensorType(dtype), u.shape
    else:
        nodes, x = [], u
    weight = _initializer(model, f"{prefix}.weight", np.ascontiguousarray(linear.w.T), dtype)
    bias = _initializer(model, f"{prefix}.bias", linear.b, dtype)
    matmul = ir.node("MatMul", [x, weight], name=f"{prefix}.matmul")
    add = ir.node("Add", [matmul.outputs[0], bias], name=f"{prefix}.add")
    nodes += [matmul, add]
    matmul.outputs[0].name = f"{prefix}.product"
    for node in (matmul, add):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), y.shape
    if y.dtype is not None and y.dtype != dtype:
        add.outputs[0].name = f"{prefix}.sum"
        nodes.append(ir.node("Cast", [add.outputs[0]], {"to": int(y.dtype)}, name=f"{prefix}.cast_output"))
        nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = ir.TensorType(y.dtype), y.shape
    output = nodes[-1].outputs[0]
    output.name = linear_output_name(layer)
    producer = y.producer()
    assert producer is not None
    producer.append(nodes)
    ir.convenience.replace_all_uses_with(y, output)


def _compute_dtype(u: ir.Value, y: ir.Value, linear: LinearLayer) -> ir.DataType:
    """The dtype of what the map reads, or float32 if its numbers do not fit into that."""
    dtype = u.dtype or ir.DataType.FLOAT
    if y.dtype == ir.DataType.FLOAT:
        return y.dtype
    if dtype == ir.DataType.FLOAT16:
        largest = max(float(np.abs(a).max(initial=0)) for a in (linear.w, linear.b))
        if largest > float(np.finfo(np.float16).max):
            return ir.DataType.FLOAT
    return dtype


def _initializer(model: ir.Model, name: str, array: NDArray[np.float32], dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    model.graph.register_initializer(value)
    return value


def _describe(model: ir.Model, regions: Sequence[AttentionRegion], plan: Plan) -> None:
    from nbl_export import __version__

    rows = []
    for region in regions:
        linear = region.layer in plan.layers
        rows.append(
            {
                "layer": region.layer,
                "kind": "linear" if linear else "attention",
                "input": input_of(region, plan),
                "output": linear_output_name(region.layer) if linear else str(region.y.name),
            }
        )
    model.metadata_props[LAYERS_KEY] = json.dumps(rows)
    model.metadata_props[KV_LAYERS_KEY] = json.dumps(list(plan.kept))
    model.metadata_props[VERSION_KEY] = __version__


def count(model: ir.Model, before: GraphSummary, after: GraphSummary, plan: Plan) -> None:
    """Step 4: raises :class:`BuildError` unless exactly what was planned has changed."""
    k = len(plan.layers)
    regions = len(find_regions(model))
    expected = {
        "attention layers": (regions, plan.layer_count - k),
        "KV pairs": (after.kv_pairs, before.kv_pairs - k),
        "inputs": (after.inputs, before.inputs - 2 * k),
        "outputs": (after.outputs, before.outputs - 2 * k),
        "dead initializers": (sum(not v.uses() for v in model.graph.initializers.values()), 0),
        "dead nodes": (sum(not _is_read(node) for node in model.graph), 0),
    }
    for what, (found, wanted) in expected.items():
        if found != wanted:
            raise BuildError(
                f"The rewritten graph has {found} {what}, expected {wanted}: nothing to rely on."
            )


def _is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)
