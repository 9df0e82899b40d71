"""Compare a rewritten graph with the unmodified one, with whose weights and operators it must compute the same.

    unmodified graph      … ─► u ─► attention ─► y ─► …
    the reference         … ─► u ─► the rewritten graph's linear layer ─► …          every cache input stays
    rewritten graph       … ─► u ─► linear layer ─► …                                the layer's cache is gone

1. The linear layers by themselves, on PyTorch's activations: W u + b, as the format stores W
   (:mod:`nbl_export.rewrite.confirm`).
2. Everything else: the unmodified graph with these same layers put in at the proven u and y. Both run the same
   operators on the same weights, so whatever quantization and half precision cost, it costs both alike, and what is
   left is rounding: a fault anywhere else (a cache of another layer, a rotary table, a position) stands out in every
   precision.

What is proven of the unmodified graph itself: :mod:`nbl_export.rewrite.prove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from nbl_export.batch.rows import real_positions
from nbl_export.blocks import Block, attentions, described
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import LAYERS_KEY, metadata_list
from nbl_export.graph.io import follow_links, load_graph, scratch
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.summary import DescribedLayer
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.candidates import blocks_of
from nbl_export.models.forward import run_uncached
from nbl_export.models.hooks import observed
from nbl_export.models.layers import backbone
from nbl_export.rewrite.adapt import merge_adapters
from nbl_export.rewrite.confirm import LinearPart, check_layers, linear_part
from nbl_export.rewrite.probe_runner import relative_error
from nbl_export.rewrite.prove import PROOF_TOLERANCE, Proof
from nbl_export.rewrite.replace import proven_regions
from nbl_export.runtime.intermediates import intermediate_tensors
from nbl_export.verify.parity.decoder import Recorded, Step

if TYPE_CHECKING:
    import torch

_AGAINST = "against the unmodified graph with the same linear layers"


def kept_cache(recorded: Recorded, plan: Plan) -> Recorded:
    """What was ``recorded`` of the unmodified graph, with the cache of the plan's attention layers alone."""
    if recorded.kv_layers is None:
        return recorded
    # The n-th entry is of the n-th attention layer, unless some attend to another's keys and values.
    every, count = attentions(plan.candidates), len(recorded.kv_layers)
    layers = every if count == len(every) else recorded.kv_layers
    places = [i for i, layer in enumerate(layers) if layer not in plan.chosen]
    steps = tuple(
        Step(s.logits, tuple(([*(c[i] for i in places), *c[count:]], real) for c, real in s.caches))
        for s in recorded.steps
    )
    return Recorded(tuple(layers[i] for i in places), recorded.lengths, steps)


def against_unmodified(
    baseline: Path | None, rewritten: Path, plan: Plan, compare: Callable[[Path], Sequence[str]]
) -> list[str]:
    """One sentence for each thing that is wrong in the graph ``rewritten`` from ``baseline`` by ``plan``.

    Without a ``baseline`` nothing is said. ``compare`` returns the gates that ``rewritten`` fails against the
    reference, whose path it is given. Raises :class:`InputError` if ``rewritten`` cannot be read or run.
    """
    if baseline is None:
        return []
    try:
        proofs = proven_regions(baseline, plan).proofs
    except (BuildError, InputError) as error:
        return [f"the unmodified graph is not what the plan was made for: {error}"]
    return differences(baseline, rewritten, plan, proofs, compare)


def differences(
    baseline: Path,
    rewritten: Path,
    plan: Plan,
    proofs: Mapping[Block, Proof],
    compare: Callable[[Path], Sequence[str]],
) -> list[str]:
    """The same with the ``proofs`` of ``baseline``."""
    failures = [
        check.failure
        for check in check_layers(rewritten, {i: proofs[i].tensors for i in plan.linear}, plan)
        if check.failure
    ]
    graph = load_graph(rewritten)
    parts = {layer: linear_part(graph, layer) for layer in plan.linear}
    whole = {layer: part for layer, part in parts.items() if isinstance(part, LinearPart)}
    if len(whole) < len(parts):  # which the checks say
        return failures
    with spliced(baseline, whole, proofs, plan) as reference:
        found = compare(reference)
    return [*failures, *(f"{_AGAINST}, {failure}" for failure in found[:1])]


@contextmanager
def spliced(
    baseline: Path, parts: Mapping[Block, LinearPart], proofs: Mapping[Block, Proof], plan: Plan
) -> Iterator[Path]:
    """A temporary graph: the unmodified one with the linear layers ``parts``, sharing the data files of both.

    What the plan drops is still computed in it, and subtracted from itself: it does not depend on how it is left out.
    """
    model = load_graph(baseline)
    values = {v.name: v for node in model.graph for v in node.outputs} | {
        v.name: v for v in model.graph.inputs
    }
    for layer, part in parts.items():
        u, y = proofs[layer].u, proofs[layer].y
        assert u is not None and y is not None  # proven layers have both
        _put_in(model, part, values[u.name], values[y.value.name])
    for layer in plan.dropped:
        y = proofs[layer].y
        assert y is not None  # as above
        _nothing(values[y.value.name], model.graph.initializers.get(str(y.later.name)) if y.later else None)
    merge_adapters(model, plan.adapters)
    model.graph.sort()
    # The folder that holds the data of both graphs.
    with scratch(model, follow_links(model) or baseline.parent) as path:
        yield path


def _nothing(y: ir.Value, later: ir.Value | None) -> None:
    """Zeros in the place of ``y``, less what is added ``later``."""
    producer, uses = y.producer(), tuple(y.uses())
    assert producer is not None
    nodes = [ir.node("Sub", [y, y], name=f"{y.name}.nothing")]
    if later is not None:
        nodes.append(ir.node("Sub", [nodes[0].outputs[0], later], name=f"{y.name}.before_bias"))
    for node in nodes:
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{node.name}.output", y.type, y.shape
    producer.append(nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _put_in(model: ir.Model, part: LinearPart, u: ir.Value, y: ir.Value) -> None:
    made: dict[ir.Value | None, ir.Value | None] = {None: None, part.reads: u}
    for weight in part.weights:
        made[weight] = ir.Value(
            name=weight.name, const_value=weight.const_value, shape=weight.shape, type=weight.type
        )
        model.graph.register_initializer(made[weight])  # type: ignore[arg-type]
    nodes = []
    for node in part.nodes:
        if node.domain not in model.graph.opset_imports:
            model.graph.opset_imports[node.domain] = 1
        copy = ir.Node(
            node.domain,
            node.op_type,
            [made[v] for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            made[old] = new
        nodes.append(copy)
    producer = y.producer()
    assert producer is not None
    producer.append(nodes)
    result = made[part.output]
    assert result is not None
    ir.convenience.replace_all_uses_with(y, result)


# where a difference begins -------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """The first layer out of tolerance, and where in it: ``"input"`` or ``"output"`` of its attention.

    ``error`` is relative, ``layer`` None if every attention agrees, so that the fault lies after the
    last one (its MLP, the final norm, the head).
    """

    layer: Block | None
    where: str
    kind: str
    error: float

    def __str__(self) -> str:
        if self.layer is None:
            return "every attention layer agrees: the difference arises after the last one (MLP, final norm or head)"
        at = "output" if self.where == "output" else "input, so the cause is before it"
        return (
            f"{described(self.layer)} ({self.kind}) is the first to leave tolerance, at its {at}: "
            f"{self.error:.1e} relative"
        )


def first_divergence(model: torch.nn.Module, plan: Plan, path: Path) -> Divergence:
    """Compare every layer's u and y of the graph at ``path`` with the linearized ``model``, in order."""
    expected: dict[tuple[Block, str], Any] = {}

    def kept(activations: Any) -> Any:
        return activations[real_positions(plan.probe, activations.shape[1])]

    def observe(index: Block, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        u = x if plan.fit_input == "normed" else h
        expected[index, "input"], expected[index, "output"] = (kept(t.cpu().numpy()) for t in (u, y))

    with (
        linearized(model, plan),
        observed(model, blocks_of(model), observe),
    ):
        run_uncached(backbone(model), plan.probe)
    graph = load_graph(path)
    tolerance = PROOF_TOLERANCE[graph_precision(graph).name]
    rows = [row for row in metadata_list(graph, LAYERS_KEY, DescribedLayer) if row.kind != "dropped"]
    found = intermediate_tensors(path, [name for row in rows for name in (row.input, row.output)], plan.probe)
    for row in rows:
        for where, name in (("input", row.input), ("output", row.output)):
            if (row.layer, where) not in expected:
                raise InputError(
                    f"{path} describes a layer {row.layer} that its model has not: rewrite it again."
                )
            error = relative_error(kept(found[name]), expected[row.layer, where])
            if not error <= (tolerance.u if where == "input" else tolerance.y):
                return Divergence(row.layer, where, row.kind, error if np.isfinite(error) else 1e308)
    return Divergence(None, "", "", 0.0)
