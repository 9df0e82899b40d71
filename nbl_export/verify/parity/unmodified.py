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
3. The rewrite is done once more, in memory, and the graph must be that, operator by operator and weight by weight
   (:mod:`nbl_export.graph.same`): a run says nothing about tokens, positions, batches and inputs that it does not have.

What is proven of the unmodified graph itself: :mod:`nbl_export.rewrite.prove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.blocks import Block, attentions
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import KV_LAYERS_KEY, LAYERS_KEY, metadata_list
from nbl_export.graph.io import load_graph, scratch
from nbl_export.graph.same import difference
from nbl_export.graph.summary import DescribedLayer
from nbl_export.graph.tensors import follow_links
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.adapt import merge_adapters
from nbl_export.rewrite.confirm import LinearPart, check_layers, linear_part
from nbl_export.rewrite.probe_runner import relative_error
from nbl_export.rewrite.prove import Proof
from nbl_export.rewrite.replace import proven_regions, rewritten_model
from nbl_export.runtime.decoder import KV
from nbl_export.runtime.intermediates import intermediate_tensors
from nbl_export.runtime.stream import Stream

_NOT_THE_REWRITE = "the graph is not what the rewrite makes of the unmodified one"
_AGAINST = "against the unmodified graph with the same linear layers"
# The relative error at which a tensor is another one: far above the order of additions, far below any fault.
_OTHER = 1e-3


@dataclass(frozen=True)
class KeptCache:
    """A ``stream`` of the reference, of whose cache only some entries count.

    ``places`` are their numbers in the stream's cache, ``kv_layers`` the model's layers that they belong to.
    """

    stream: Stream
    kv_layers: tuple[int, ...]
    places: tuple[int, ...]

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        return self.stream.prefill(rows)

    def decode(self, tokens: Sequence[int]) -> F32:
        return self.stream.decode(tokens)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        entries, real = self.stream.cache()
        states = entries[len(self.stream.kv_layers or ()) :]
        return [*(entries[i] for i in self.places), *states], real

    def reserve(self, tokens: int) -> None:
        self.stream.reserve(tokens)


def kept_cache(stream: Stream, plan: Plan) -> Stream:
    """``stream`` of the unmodified graph with the cache of the plan's attention layers alone."""
    if stream.kv_layers is None:
        return stream
    # The n-th entry is of the n-th attention layer, unless some attend to another's keys and values.
    every = attentions(plan.candidates)
    layers = every if len(stream.kv_layers) == len(every) else stream.kv_layers
    gone = set(plan.chosen)
    places = tuple(i for i, layer in enumerate(layers) if layer not in gone)
    return KeptCache(stream, tuple(layers[i] for i in places), places)


def against_unmodified(
    baseline: Path | None, rewritten: Path, plan: Plan, compare: Callable[[Path], Sequence[str]]
) -> list[str]:
    """One sentence for each thing that is wrong in the graph ``rewritten`` from ``baseline`` by ``plan``.

    Without a ``baseline`` nothing is said.
    ``compare`` returns the gates that ``rewritten`` fails against the reference, whose path it is given. Raises
    :class:`InputError` if ``rewritten`` cannot be read or run.
    """
    if baseline is None:
        return []
    try:
        proven = proven_regions(baseline, plan)
    except (BuildError, InputError) as error:
        return [f"the unmodified graph is not what the plan was made for: {error}"]
    found = differences(baseline, rewritten, plan, proven.proofs, compare)
    other = difference(rewritten_model(proven, plan), load_graph(rewritten), (LAYERS_KEY, KV_LAYERS_KEY))
    return [*found, *([f"{_NOT_THE_REWRITE}: {other}"] if other else [])]


def differences(
    baseline: Path,
    rewritten: Path,
    plan: Plan,
    proofs: Mapping[Block, Proof],
    compare: Callable[[Path], Sequence[str]],
) -> list[str]:
    """The same with the ``proofs`` of ``baseline``."""
    failures = [check.failure for check in check_layers(rewritten, proofs, plan) if check.failure]
    graph = load_graph(rewritten)
    parts = {layer: linear_part(graph, layer) for layer in plan.linear}
    whole = {layer: part for layer, part in parts.items() if isinstance(part, LinearPart)}
    if len(whole) < len(parts):  # which the checks say
        return failures
    with spliced(baseline, whole, proofs, plan) as reference:
        found = compare(reference)
        if found:
            where = first_difference(reference, rewritten, plan)
            failures.append(f"{_AGAINST}, {found[0]}{where}")
        return failures


def first_difference(reference: Path, rewritten: Path, plan: Plan) -> str:
    """The first layer whose u or y is another one in the two graphs on the probe, as the end of a sentence."""
    graphs = [load_graph(path) for path in (reference, rewritten)]
    rows = metadata_list(graphs[1], LAYERS_KEY, DescribedLayer)
    of_reference, of_rewritten = ({v.name for node in g.graph for v in node.outputs} for g in graphs)
    known = of_reference & of_rewritten
    names = [name for row in rows for name in (row.input, row.output) if name in known]
    expected, found = (intermediate_tensors(path, names, plan.probe) for path in (reference, rewritten))
    for row in rows:
        for where in ("input", "output"):
            if (name := getattr(row, where)) not in known:
                continue
            width = found[name].shape[-1]
            a, b = (tensors[name].reshape(-1, width) for tensors in (found, expected))
            if not relative_error(a, b) <= _OTHER:
                return f", and the {where} of layer {row.layer} ({row.kind}) is the first tensor that differs"
    return ""


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
    producer = y.producer()
    assert producer is not None
    zeros = ir.node("Sub", [y, y], name=f"{y.name}.nothing")
    nodes = [zeros]
    if later is not None:
        nodes.append(ir.node("Sub", [zeros.outputs[0], later], name=f"{y.name}.before_bias"))
    result = nodes[-1].outputs[0]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
            f"{node.name}.output",
            y.type,
            y.shape,
        )
    producer.append(nodes)
    for use in tuple(y.uses()):
        if use.node is not zeros:
            use.node.replace_input_with(use.idx, result)


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
