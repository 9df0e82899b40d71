"""Replace planned attention by MatMul + Add in the graph: find, prove, replace, count.

    before                                        after
    h ─► norm ─► q,k,v ─► rope ─► core ─► o ─►+   h ─► norm ─► MatMul(Wᵀ) ─► Add(b) ─►+
    │              past/present K,V           │   │                                   │
    └─────────────────────────────────────────┘   └───────────────────────────────────┘

1. Find every layer's u and y (:mod:`.planned`); a planned layer without a region is an error.
2. Prove them numerically against PyTorch's activations (:mod:`.prove`).
3. Replace y by MatMul(u, Wᵀ) + b, with one MatMul per factor of a low-rank W, or leave it out where it is dropped
   (:mod:`.leave_out`); remove dead nodes, dead initializers and the layers' KV pairs; renumber the retained pairs.
4. Count: exactly K regions and K KV pairs are removed, no dead node or initializer is left, the checker and
   strict shape inference pass, and the written layers compute W u + b. Anything else is an error, and no
   file is overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.blocks import Block, as_json, attentions, part_of
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import KV_LAYERS_KEY, LAYERS_KEY, kv_layers, kv_pairs, metadata_list
from nbl_export.graph.cores import remember_roles
from nbl_export.graph.facts import summarize
from nbl_export.graph.io import initializer, load_graph, save_graph
from nbl_export.graph.nodes import late_initializer
from nbl_export.graph.operators import infer_types, remove_unused, weight_bits
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.regions import Region, find_regions
from nbl_export.graph.summary import (
    DescribedLayer,
    GraphSummary,
    RewriteRecord,
    RewriteSummary,
    StoredError,
)
from nbl_export.linearize.plan import LinearLayer, Plan, linear_name, linear_output_name
from nbl_export.progress import Listener, Silent, bytes_task
from nbl_export.rewrite.adapt import merge_adapters
from nbl_export.rewrite.confirm import confirm
from nbl_export.rewrite.leave_out import leave_out, remove_pairs
from nbl_export.rewrite.planned import planned_attentions, planned_mlps
from nbl_export.rewrite.prove import PROOF_TOLERANCE, Proof, prove, without_later
from nbl_export.rewrite.quantize import product
from nbl_export.runtime.session import check_like

Save = Callable[[ir.Model, Path, Callable[[Path], Any], Callable[[int], object]], list[Path]]
VERSION_KEY = "nbl_export.version"
# What storing W may cost before it is worth a line: half precision costs less.
_NOTICED = 5e-3


@dataclass(frozen=True)
class RewriteResult:
    """What was done: the graph before and after, the proof of each layer, and the files written.

    ``stored`` is what storing W in the graph's format costs each linear layer, ‖Ŵu - Wu‖ / ‖Wu‖; ``kv_layers`` are the
    layers that keep keys and values.
    """

    before: GraphSummary
    after: GraphSummary
    proofs: dict[Block, Proof]
    files: list[Path]
    stored: dict[Block, float] = field(default_factory=dict)
    kv_layers: tuple[int, ...] = ()


def rewrite_file(
    source: Path, plan: Plan, target: Path, listener: Listener | None = None, save: Save = save_graph
) -> RewriteResult:
    """Rewrite the graph at ``source`` by ``plan`` and write it to ``target``.

    ``save`` writes it, and calls the check that it is given on the finished file. Raises :class:`InputError` if
    ``source`` is unreadable, already rewritten or of another model, and :class:`BuildError` if a planned layer is not
    found, not proven, or the counts are wrong.
    """
    if LAYERS_KEY in load_graph(source).metadata_props:
        raise InputError(f"{source} is already rewritten: rewrite the original graph instead.")
    check_file, listener = check_like(source), listener or Silent()
    found = proven_regions(source, plan, listener)
    kept = kept_layers(found.model, plan)
    model = rewritten_model(found, plan)
    stored: dict[Block, float] = {}

    def check(written: Path) -> None:
        check_file(written)
        count(load_graph(written), written, found, plan)
        stored.update((c.layer, c.stored) for c in confirm(written, found.proofs, plan))

    with bytes_task(listener, "Writing the graph", found.before.file_bytes) as done:
        files = save(model, target, check, done)
    if (most := max(stored.values(), default=0)) >= _NOTICED:
        worst = next(layer for layer, error in stored.items() if error == most)
        listener.note(
            f"Storing W changes W u by {sum(stored.values()) / len(stored):.1%} on average, most in layer {worst} "
            f"({most:.1%}), measured on the probe."
        )
    after = summarize(load_graph(target), target)
    return RewriteResult(found.before, after, found.proofs, files, stored, kept)


def rewrite_summary(result: RewriteResult) -> RewriteSummary:
    """The result, for a JSON file."""
    proofs = tuple(p.errors for p in result.proofs.values())
    stored = tuple(StoredError(layer, error) for layer, error in result.stored.items())
    return RewriteSummary(result.before, result.after, result.kv_layers, proofs, stored=stored)


def rewrite_record(result: RewriteResult) -> RewriteRecord:
    """The result, with the names of the proven tensors."""
    tensors = tuple(p.tensors for p in result.proofs.values() if p.u is not None)
    return RewriteRecord(**vars(rewrite_summary(result)), tensors=tensors)


def kept_layers(unmodified: ir.Model, plan: Plan) -> tuple[int, ...]:
    """The layers that keep their attention after ``plan``, those aside that attend to another's keys and values."""
    pairs = len(kv_pairs(unmodified))
    if pairs in (0, len(attentions(plan.candidates))):
        return plan.attention_layers
    return tuple(layer for layer in kv_layers(unmodified) if layer not in plan.chosen)


def linearized_layers(model: ir.Model) -> tuple[Block, ...]:
    """The linear layers, from the graph's metadata; empty for a graph that was not rewritten."""
    return tuple(r.layer for r in metadata_list(model, LAYERS_KEY, DescribedLayer) if r.kind == "linear")


def drop_layers(model: ir.Model) -> None:
    """Drop the linear layers of a rewritten graph, in place: the baseline that it is measured against.

    Raises :class:`InputError` for a graph in which a layer's output is not simply added to the residual stream.
    """
    outputs = {value.name: value for node in model.graph for value in node.outputs}
    for layer in linearized_layers(model):
        leave_out(model, layer, outputs[linear_output_name(layer)])


# 1, 2 --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProvenGraph:
    """A graph as it was read, its summary, its number of ``attention`` layers, and the proof of each planned region.

    ``cached`` are the layers that have a KV pair of their own, in the order of the pairs.
    """

    model: ir.Model
    before: GraphSummary
    attention: int
    regions: dict[Block, Region]
    proofs: dict[Block, Proof]
    cached: tuple[Block, ...] = ()


def proven_regions(source: Path, plan: Plan, listener: Listener | None = None) -> ProvenGraph:
    """Steps 1 and 2 for the graph at ``source``; the errors are those of :func:`rewrite_file`."""
    model = load_graph(source)
    before = summarize(model, source)
    remove_unused(model)  # dead nodes of the exporter would disturb the search
    found = find_regions(model)
    planned = planned_attentions(model, found, plan)
    every = [*planned, *planned_mlps(model, planned, plan)]
    regions = {r.layer: r for r in sorted(every, key=lambda r: r.layer) if isinstance(r, Region)}
    with bytes_task(listener or Silent(), "Proving the regions", before.file_bytes) as done:
        proofs = prove(source, model, list(regions.values()), plan, done)
    cached = tuple(entry.layer for entry in planned if entry.pair is not None)
    return ProvenGraph(model, before, len(found), regions, proofs, cached)


# 3 -----------------------------------------------------------------------------------------------


def rewritten_model(found: ProvenGraph, plan: Plan) -> ir.Model:
    """The model that was ``found``, rewritten in place; W is computed when it is read or written."""
    model, proofs, regions = found.model, found.proofs, found.regions
    tolerance = PROOF_TOLERANCE[graph_precision(model).name]
    pairs = kv_pairs(model)
    remember_roles(model)
    untyped = [v for node in model.graph for v in node.outputs if v.type is None and v.shape is None]
    infer_types(model)
    for layer in plan.linear:
        _insert(model, layer, proofs[layer], regions[layer].projection, plan)
    remove_unused(model)
    for layer in plan.dropped:
        y = proofs[layer].proven[1]
        leave_out(model, layer, y.value, y.later)
    gone = (regions[layer].pair for layer in plan.linear_attention)
    remove_pairs(model, {pair for pair in gone if pair is not None}, pairs)
    for value in untyped:  # inferred types are not written to the graph
        if not value.is_graph_output():
            value.type = value.shape = None
    model.graph.sort()
    for layer, node in [(i, node) for i in plan.chosen for node in regions[i].linear_nodes]:
        readers = [use.node for v in node.outputs for use in v.uses()] if node.graph is not None else []
        if readers:
            raise BuildError(
                f"Layer {layer} cannot be removed: {readers[0].op_type} ({readers[0].name}) still reads the output "
                f"of its {node.op_type} ({node.name}); leave the layer out of the plan."
            )
    merge_adapters(model, plan.adapters)
    _describe(model, [p for p in proofs.values() if p.holds(tolerance)], found.cached, plan)
    return model


def _insert(model: ir.Model, layer: Block, proof: Proof, neighbour: ir.Node, plan: Plan) -> None:
    (u, output), prefix, linear = proof.proven, linear_name(layer), plan.layers[layer]
    y = output.value
    if y.is_graph_output():
        raise BuildError(
            f"Layer {layer} cannot be replaced: the output of its attention, {y.name}, is a graph output; leave the "
            "layer out of the plan."
        )
    dtype = _compute_dtype(u, y, linear, bool(weight_bits(neighbour)))
    nodes: list[ir.Node] = []

    def emit(new: list[ir.Node], name: str, node: str, to: ir.DataType, shape: ir.Shape | None) -> ir.Value:
        """What the last of the ``new`` nodes, which is called ``node``, writes as ``name``."""
        nodes.extend(new)
        value, new[-1].name = new[-1].outputs[0], f"{prefix}.{node}"
        value.name, value.type, value.shape = f"{prefix}.{name}", ir.TensorType(to), shape
        return value

    def cast(value: ir.Value, name: str, side: str, to: ir.DataType) -> ir.Value:
        return emit([ir.node("Cast", [value], {"to": int(to)})], name, f"cast_{side}", to, value.shape)

    x = u if u.dtype == dtype else cast(u, "input", "input", dtype)
    d, rank = plan.hidden_size, plan.rank_of(layer)
    # The matrices that u is multiplied by, in order: W, or the two factors of a low-rank W.
    factors = [("", "w", (d, d))] if rank is None else [("down_", "down", (rank, d)), ("", "up", (d, rank))]
    for part, name, size in factors:
        add = partial(_add_initializer, model.graph, f"{prefix}.{part}")
        # Loaded when it is read or written.
        made = product(x, lambda name=name: getattr(plan.layers[layer], name), size, dtype, neighbour, add)  # type: ignore[misc]
        shape = ir.Shape([*y.shape[:-1], size[0]]) if y.shape is not None else None
        x = emit(made, f"{part}product", f"{part}matmul", dtype, shape)
    b = without_later(output.later, linear.b)  # a bias that is added after y must not be added twice
    bias = _add_initializer(model.graph, f"{prefix}.", "bias", b, dtype)
    wanted = y.dtype or dtype
    name = "output" if wanted == dtype else "sum"
    result = emit([ir.node("Add", [x, bias])], name, "add", dtype, y.shape)
    if wanted != dtype:
        result = cast(result, "output", "output", wanted)
    producer = y.producer()
    assert producer is not None and result.name == linear_output_name(layer)
    producer.append(nodes)
    ir.convenience.replace_all_uses_with(y, result)


def _add_initializer(
    graph: ir.Graph,
    prefix: str,
    name: str,
    numbers: NDArray[Any] | Callable[[], NDArray[Any]],
    dtype: ir.DataType,
    shape: tuple[int, ...] = (),
) -> ir.Value:
    """An initializer of ``graph``; ``numbers`` of the ``shape`` that are a function are computed when they are read."""
    name = f"{prefix}{name}"

    if callable(numbers):
        return late_initializer(graph, name, shape, dtype, lambda: numbers().astype(dtype.numpy()))
    return initializer(graph, ir.tensor(numbers.astype(dtype.numpy()), dtype=dtype, name=name), name)


def _compute_dtype(u: ir.Value, y: ir.Value, linear: LinearLayer, quantized: bool) -> ir.DataType:
    """The dtype of the linear layer's input, or float32 if W or b do not fit into it."""
    dtype = u.dtype or ir.DataType.FLOAT
    if y.dtype == ir.DataType.FLOAT and not quantized:
        return y.dtype
    if dtype == ir.DataType.FLOAT16:
        read = (linear.w, linear.b) if linear.down is None else (linear.down, linear.up, linear.b)
        largest = max(float(np.abs(a).max(initial=0)) for a in read if a is not None)
        if largest > float(np.finfo(np.float16).max):
            return ir.DataType.FLOAT
    return dtype


def _describe(model: ir.Model, proofs: list[Proof], cached: tuple[Block, ...], plan: Plan) -> None:
    from nbl_export import __version__

    rows = []
    for proof in proofs:
        (u, y), layer = proof.proven, proof.layer
        said: tuple[str, str, str] = (part_of(layer), str(u.name), str(y.value.name))
        if layer in plan.layers:
            said = "linear", str(u.name), linear_output_name(layer)
        elif layer in plan.dropped:
            said = "dropped", "", ""
        rows.append({"layer": as_json(layer), **dict(zip(("kind", "input", "output"), said, strict=True))})
    model.metadata_props[LAYERS_KEY] = json.dumps(rows)
    model.metadata_props[KV_LAYERS_KEY] = json.dumps([layer for layer in cached if layer not in plan.chosen])
    model.metadata_props[VERSION_KEY] = __version__


# 4 -----------------------------------------------------------------------------------------------


def count(model: ir.Model, path: Path, found: ProvenGraph, plan: Plan) -> None:
    """Raises :class:`BuildError` unless exactly the planned changes were made to what was ``found``."""
    before, after = found.before, summarize(model, path)
    cached = len(set(found.cached) & set(plan.chosen))
    dead = [n for n in model.graph if not any(v.uses() or v.is_graph_output() for v in n.outputs)]
    for what, has, wanted in (
        ("attention layers", len(find_regions(model)), found.attention - len(plan.linear_attention)),
        ("KV pairs", after.kv_pairs, before.kv_pairs - cached),
        ("inputs", after.inputs, before.inputs - 2 * cached),
        ("outputs", after.outputs, before.outputs - 2 * cached),
        ("dead initializers", sum(not v.uses() for v in model.graph.initializers.values()), 0),
        ("dead nodes", len(dead), 0),
    ):
        if has != wanted:
            raise BuildError(
                f"The rewritten graph has {has} {what}, expected {wanted}, so it is discarded: report this bug of "
                "nbl-export."
            )
