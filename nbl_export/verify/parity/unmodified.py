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

What was proven of the unmodified graph when it was rewritten: :mod:`nbl_export.rewrite.prove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from nbl_export.batch import real_positions
from nbl_export.blocks import Block, attentions, described
from nbl_export.graph.cache import LAYERS_KEY, metadata_list
from nbl_export.graph.io import follow_links, load_graph, scratch
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.summary import DescribedLayer, ProvenTensors
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.candidates import blocks_of
from nbl_export.models.forward import run_uncached
from nbl_export.models.layers import backbone
from nbl_export.models.running import observed
from nbl_export.rewrite.adapt import merge_adapters
from nbl_export.rewrite.confirm import LinearPart, check_layers, linear_part
from nbl_export.rewrite.probe_runner import ProbeRunner
from nbl_export.rewrite.prove import PROOF_TOLERANCE
from nbl_export.verify.parity.compare import Recorded, Step

_AGAINST = "against the unmodified graph with the same linear layers"
# The tensors that were proven in the unmodified graph, by layer.
Tensors = Mapping[Block, ProvenTensors]


def kept_cache(recorded: Recorded, plan: Plan) -> Recorded:
    """What was ``recorded`` of the unmodified graph, with the cache of the plan's attention layers alone."""
    if recorded.kv_layers is None:
        return recorded
    # The n-th entry is of the n-th attention layer, unless some attend to another's keys and values.
    every, count = attentions(plan.candidates), len(recorded.kv_layers)
    layers = every if count == len(every) else recorded.kv_layers
    places = [i for i, layer in enumerate(layers) if layer not in plan.chosen]

    def left(step: Step) -> Step:
        if step.kept is None:
            return step
        cache, real = step.kept
        return Step(step.logits, ([*(cache[i] for i in places), *cache[count:]], real))

    batches = tuple(tuple(map(left, steps)) for steps in recorded.batches)
    return replace(recorded, kv_layers=tuple(layers[i] for i in places), batches=batches)


def differences(
    baseline: Path, rewritten: Path, plan: Plan, tensors: Tensors, compare: Callable[[Path], Sequence[str]]
) -> list[str]:
    """One sentence for each thing that is wrong in the graph ``rewritten`` from ``baseline`` by ``plan``.

    ``tensors`` are those proven in ``baseline``. ``compare`` returns the gates that ``rewritten`` fails against the
    reference, whose path it is given. Raises :class:`InputError` if ``rewritten`` cannot be read or run.
    """
    failures = [check.failure for check in check_layers(rewritten, tensors, plan) if check.failure]
    graph = load_graph(rewritten)
    found = {layer: linear_part(graph, layer) for layer in plan.linear}
    parts = {layer: part for layer, part in found.items() if isinstance(part, LinearPart)}
    if len(parts) == len(found):  # otherwise the checks say it
        with spliced(baseline, parts, tensors, plan) as reference:
            failures += [f"{_AGAINST}, {failure}" for failure in compare(reference)[:1]]
    return failures


@contextmanager
def spliced(
    baseline: Path, parts: Mapping[Block, LinearPart], tensors: Tensors, plan: Plan
) -> Iterator[Path]:
    """A temporary graph: the unmodified one with the linear layers ``parts``, sharing the data files of both.

    What the plan drops is still computed in it, and subtracted from itself: it does not depend on how it is left out.
    """
    model = load_graph(baseline)
    values = {v.name: v for v in model.graph.inputs} | {v.name: v for n in model.graph for v in n.outputs}
    for layer, part in parts.items():
        _put_in(model, part, values[tensors[layer].input], values[tensors[layer].output])
    for layer in plan.dropped:
        one = tensors[layer]
        _nothing(values[one.output], model.graph.initializers.get(one.later))
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
        own = ir.Value(name=weight.name, const_value=weight.const_value, shape=weight.shape, type=weight.type)
        model.graph.register_initializer(own)
        made[weight] = own
    nodes = []
    for node in part.nodes:
        model.graph.opset_imports.setdefault(node.domain, 1)
        inputs, attributes = [made[v] for v in node.inputs], list(node.attributes.values())
        copy = ir.Node(
            node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            made[old] = new
        nodes.append(copy)
    producer, result = y.producer(), made[part.output]
    assert producer is not None and result is not None
    producer.append(nodes)
    ir.convenience.replace_all_uses_with(y, result)


# where a difference begins -------------------------------------------------------------------------


def first_divergence(model: torch.nn.Module, plan: Plan, path: Path) -> str | None:
    """The first layer of the graph at ``path`` whose u or y is not that of the linearized ``model``, in words.

    None if every attention agrees, so that the fault lies after the last one (its MLP, the final norm, the head).
    """
    expected: dict[tuple[Block, str], np.ndarray] = {}

    def observe(index: Block, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        for where, tensor in (("input", x if plan.fit_input == "normed" else h), ("output", y)):
            array = tensor.cpu().numpy()
            expected[index, where] = array[real_positions(plan.probe, array.shape[1])]

    with linearized(model, plan), observed(model, blocks_of(model), observe):
        run_uncached(backbone(model), plan.probe)
    graph = load_graph(path)
    tolerance = PROOF_TOLERANCE[graph_precision(graph).name]
    described_rows = metadata_list(graph, LAYERS_KEY, DescribedLayer)
    rows = [row for row in described_rows if row.kind != "dropped" and (row.layer, "input") in expected]
    # The experts of the original are not those of the linearized model.
    runner = ProbeRunner(path, replace(plan, probe_routes={}))
    found = runner.run(list(dict.fromkeys(name for row in rows for name in (row.input, row.output))), {})
    for row in rows:
        for where, name, most in (("input", row.input, tolerance.u), ("output", row.output, tolerance.y)):
            error = runner.error([one[name] for one in found], expected[row.layer, where])
            if not error <= most:
                at = "output" if where == "output" else "input, so the cause is before it"
                first = f"{described(row.layer)} ({row.kind}) is the first to leave tolerance, at its {at}"
                return f"{first}: {error if np.isfinite(error) else 1e308:.1e} relative"
    return None
