"""Weights of real networks, parsed and not built: a right pair passes in every precision, and no wrong one does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nbl_export.blocks import Mlp, Span
from nbl_export.engine.build import parsable
from nbl_export.engine.library import Library
from nbl_export.engine.network import parse_network
from nbl_export.engine.weights import NetworkWeights, check_pair, network_weights
from nbl_export.errors import BuildError
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.linearize.adapters import Adapter, digest_of, weight_digests
from nbl_export.linearize.plan import LinearLayer, Plan, load_plan
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.stages.build import mlp_weights
from nbl_export.workspace import Workspace
from tests.end_to_end.matrix import CHOSEN
from tests.engine.conftest import Graphs, converted
from tests.families import Calibrated
from tests.fixtures_graph import low_rank, perturb, plan_by_hand

Made = Callable[[str, str], Graphs]


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return load_plan(Workspace.open(stories_out).plan)


def weights(library: Library, path: Path) -> NetworkWeights:
    with parsable(path, 64) as parsed:
        network = parse_network(library, parsed, path)
    return network_weights(library, network.network, load_graph(path))


def rewritten(source: Path, plan: Plan, folder: Path) -> Path:
    target = folder / "rewritten" / "model.onnx"
    rewrite_file(source, plan, target)
    return target


def refused(
    base: NetworkWeights,
    linear: NetworkWeights,
    plan: Plan,
    mlps: Mapping[Mlp, Sequence[str]] | None = None,
) -> str:
    with pytest.raises(BuildError) as caught:
        check_pair(base, linear, plan, mlps)
    message = str(caught.value)
    assert message.startswith("The base's and the linearized network do not belong together (")
    assert message.endswith("then build.") and "\n" not in message
    return message.split("(", 1)[1].split(")")[0]


# what is counted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_weights_are_those_of_the_file(
    rtx: Library, graphs: Made, tmp_path: Path, precision: str
) -> None:
    path = graphs(precision, "static").base
    found = weights(rtx, path)
    stored = {i.name: i for i in onnx.load(str(path)).graph.initializer}
    floats = [
        digest_of(numpy_helper.to_array(i))
        for i in stored.values()
        if i.data_type != onnx.TensorProto.INT64 and np.prod(i.dims) > 1
    ]
    assert Counter(digest for _, digest in found.named) == Counter(floats)
    assert len(found.attention) == 5
    for layer, digests in enumerate(found.attention):
        names = [n for n in stored if f"layers.{layer}.self_attn" in n]
        assert len(names) == 4
        assert set(digests) == {digest_of(numpy_helper.to_array(stored[n])) for n in names}
    # Three of each layer's MLP, and the head.
    assert len(found.others) == 16 and not set(found.others) & {d for ds in found.attention for d in ds}


# right pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["concat", "static"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_right_pair_passes(rtx: Library, graphs: Made, plan: Plan, precision: str, form: str) -> None:
    made = graphs(precision, form)
    check_pair(weights(rtx, made.base), weights(rtx, made.linearized), plan)


def test_so_it_does_with_no_layer_and_with_every_layer_linear(
    rtx: Library, graphs: Made, plan: Plan, stories_out: Path
) -> None:
    made = graphs("fp16", "static")
    base = weights(rtx, made.base)
    check_pair(base, base, plan.without_layers())
    check_pair(base, weights(rtx, made.bare), plan_by_hand(stories_out, range(5)))


def test_so_it_does_with_factors_for_w(rtx: Library, graphs: Made, plan: Plan, tmp_path: Path) -> None:
    source = graphs("fp16", "static").base
    factors = low_rank(plan, 8)
    base, linear = weights(rtx, source), weights(rtx, rewritten(source, factors, tmp_path))
    check_pair(base, linear, factors)
    assert (
        refused(base, linear, plan) == "the linearized one does not have the plan's W in the place of layer 2"
    )


def test_so_it_does_with_repaired_weights(rtx: Library, graphs: Made, plan: Plan, tmp_path: Path) -> None:
    source = graphs("fp32", "static").base
    name = "model.layers.2.mlp.down_proj.matmul_weight"
    stored = next(i for i in onnx.load(str(source)).graph.initializer if i.name == name)
    weight = numpy_helper.to_array(stored)
    change = np.full((weight.shape[0], 1), 0.01, np.float32), np.ones((1, weight.shape[1]), np.float32)
    repaired = replace(plan, adapters={name: Adapter(*change, weight_digests(weight))})
    base, linear = weights(rtx, source), weights(rtx, rewritten(source, repaired, tmp_path))
    check_pair(base, linear, repaired)
    assert refused(base, linear, plan) == "the linearized one lacks 1 weights that the plan keeps"


# wrong pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_wrong_two_graphs_are_refused(rtx: Library, graphs: Made, plan: Plan, precision: str) -> None:
    made = graphs(precision, "static")
    base, linear, bare = (weights(rtx, p) for p in (made.base, made.linearized, made.bare))
    count = "they have {} and {} attention layers, not 5 and 3"
    assert refused(linear, base, plan) == count.format(3, 5)  # swapped
    assert refused(base, base, plan) == count.format(5, 5)
    assert refused(linear, linear, plan) == count.format(3, 3)
    assert refused(base, bare, plan) == count.format(5, 0)


def test_a_pair_of_another_plan_is_refused(rtx: Library, graphs: Made, plan: Plan, stories_out: Path) -> None:
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    assert plan.chosen == (2, 3)
    for layers, found in (((0, 1), 0), ((2, 4), 4), ((1, 3), 1)):
        why = f"4 of 4 weights of the attention of layer {found} are in both"
        assert refused(base, linear, plan_by_hand(stories_out, layers)) == why
    # The same layers, of another calibration and in another order.
    why = "the linearized one does not have the plan's W in the place of layer {}"
    two, three = plan.layers[2], plan.layers[3]
    other = replace(plan, layers={2: two, 3: LinearLayer(three.w * np.float32(1.01), three.b)})
    assert refused(base, linear, other) == why.format(3)
    assert refused(base, linear, replace(plan, layers={2: three, 3: two})) == why.format(2)


def test_a_model_of_another_depth_is_refused(rtx: Library, graphs: Made, plan: Plan) -> None:
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    shallow = replace(plan, probe_y={i: y for i, y in plan.probe_y.items() if i != 0})
    assert refused(base, linear, shallow) == "they have 5 and 3 attention layers, not 4 and 2"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "layers.3.nbl_linear.weight",
            "the linearized one does not have the plan's W in the place of layer 3",
        ),
        (
            "model.layers.1.self_attn.q_proj.matmul_weight",
            "the linearized one lacks 1 weights of layer 1 that the plan keeps",
        ),
        (
            "model.layers.3.mlp.up_proj.matmul_weight",
            "the linearized one lacks 1 weights that the plan keeps",
        ),
        ("lm_head.weight", "the linearized one lacks 1 weights that the plan keeps"),
    ],
)
def test_a_changed_weight_is_refused(
    rtx: Library, graphs: Made, plan: Plan, tmp_path: Path, name: str, why: str
) -> None:
    """As of another fine-tune, or damaged after the rewrite."""
    source = graphs("fp32", "static").base
    target = rewritten(source, plan, tmp_path)
    check_pair(weights(rtx, source), weights(rtx, target), plan)
    perturb(target, name, 1.001)
    assert refused(weights(rtx, source), weights(rtx, target), plan) == why


def test_attention_that_is_still_there_is_refused(rtx: Library, graphs: Made, plan: Plan) -> None:
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    left = replace(linear, named=(*linear.named, ("left", base.attention[3][0])))
    assert refused(base, left, plan) == "1 of 4 weights of the attention of layer 3 are in both"


def test_a_weight_of_neither_is_refused(rtx: Library, graphs: Made, plan: Plan) -> None:
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    for count in (1, 2):
        foreign = replace(linear, named=(*linear.named, *(("norm", digest) for digest in "ab"[:count])))
        why = f"the linearized one has {count} weights that are neither in the base nor in the plan"
        assert refused(base, foreign, plan) == why


def test_two_biases_are_one_too_many(rtx: Library, graphs: Made, plan: Plan) -> None:
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    twice = replace(linear, named=(*linear.named, ("layers.2.nbl_linear.bias", "c")))
    assert refused(base, twice, plan) == "the linearized one has 3 weights in the place of layer 2"


def test_what_cannot_be_compared_is_not_passed(rtx: Library, graphs: Made, plan: Plan) -> None:
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    blind = replace(base, attention=(*base.attention[:3], (), ()))
    assert refused(blind, linear, plan) == "the base has no weight of the attention of layer 3"


def test_weights_that_layers_share_may_stay(rtx: Library, graphs: Made, plan: Plan) -> None:
    """ALBERT has one set for all of its layers: those of layer 3 are then those of layer 0, too."""
    made = graphs("fp16", "static")
    base, linear = weights(rtx, made.base), weights(rtx, made.linearized)
    shared = base.attention[0]
    check_pair(replace(base, attention=(*base.attention[:3], shared, base.attention[4])), linear, plan)


# MLPs --------------------------------------------------------------------------------------------

# The attentions of layers 1 and 3, the MLPs of layers 1 and 2.
MIXED = CHOSEN["half"]


@dataclass(frozen=True)
class Mixed:
    """The base of a model, its pair with :data:`MIXED` linear, and that with another MLP linear, too."""

    base: NetworkWeights
    linear: NetworkWeights
    plan: Plan
    mlps: Mapping[Mlp, Sequence[str]]
    more: NetworkWeights
    source: Path


@pytest.fixture(scope="module")
def mixed(
    rtx: Library, calibrated_of: Callable[[str], Calibrated], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Mixed]:
    """Called with a family: its float16 graphs with a static cache, parsed once."""

    @cache
    def made(family: str) -> Mixed:
        folder, case = tmp_path_factory.mktemp(family), calibrated_of(family)
        save_graph(trace(case.model, FORMS["static"]), folder / "float32.onnx")
        source = converted(folder / "float32.onnx", folder / "model.onnx", "fp16")
        plan, more = case.plan(MIXED), case.plan((*MIXED, Mlp(3)))
        of_plan, of_more = (weights(rtx, rewritten(source, p, folder)) for p in (plan, more))
        return Mixed(weights(rtx, source), of_plan, plan, mlp_weights(source, plan), of_more, source)

    return made


# Gated, in one projection, plain with biases, beside the attention.
@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("phi3", 2), ("gpt2", 2), ("gpt_neox", 2)])
def test_mlps_of_the_plan_are_gone(mixed: Callable[[str], Mixed], family: str, count: int) -> None:
    made = mixed(family)
    assert {mlp: len(names) for mlp, names in made.mlps.items()} == {Mlp(1): count, Mlp(2): count}
    check_pair(made.base, made.linear, made.plan, made.mlps)


def test_what_a_span_drops_is_gone(
    mixed: Callable[[str], Mixed], calibrated_of: Callable[[str], Calibrated], rtx: Library, tmp_path: Path
) -> None:
    """And an MLP that is dropped in the plan, and is still there, is refused."""
    base, source = mixed("llama").base, mixed("llama").source
    plan = calibrated_of("llama").plan(CHOSEN["spans"])
    linear, mlps = weights(rtx, rewritten(source, plan, tmp_path)), mlp_weights(source, plan)
    assert set(mlps) == {Mlp(0), Mlp(1), Mlp(2), Mlp(3)}
    check_pair(base, linear, plan, mlps)
    less = calibrated_of("llama").plan((Span(0, 0), 1, Mlp(2), Span(3, 3)))
    stays = weights(rtx, rewritten(source, less, tmp_path))
    assert refused(base, stays, plan, mlps).endswith("weights of the MLP of layer 1 are in both")


def test_mlps_that_are_still_there_are_refused(mixed: Callable[[str], Mixed]) -> None:
    made = mixed("llama")
    down = dict(made.base.named)[made.mlps[Mlp(2)][-1]]
    left = replace(made.linear, named=(*made.linear.named, ("left", down)))
    why = refused(made.base, left, made.plan, made.mlps)
    assert why == "1 of 3 weights of the MLP of layer 2 are in both"


def test_an_mlp_that_stays_in_the_plan_and_is_gone_is_refused(mixed: Callable[[str], Mixed]) -> None:
    made = mixed("llama")
    why = refused(made.base, made.more, made.plan, made.mlps)
    assert why == "the linearized one lacks 3 weights that the plan keeps"


def test_an_mlp_whose_weights_are_not_known_is_not_passed(mixed: Callable[[str], Mixed]) -> None:
    made = mixed("llama")
    assert refused(made.base, made.linear, made.plan) == "the base has no weight of the MLP of layer 1"


def test_a_scaled_w_of_an_mlp_is_refused(mixed: Callable[[str], Mixed]) -> None:
    made = mixed("llama")
    layer = made.plan.layers[Mlp(2)]
    scaled = LinearLayer(layer.w * np.float32(1.01), layer.b)
    other = replace(made.plan, layers={**made.plan.layers, Mlp(2): scaled})
    why = refused(made.base, made.linear, other, made.mlps)
    assert why == "the linearized one does not have the plan's W in the place of the MLP of layer 2"


def test_weights_that_mlps_share_may_stay(mixed: Callable[[str], Mixed]) -> None:
    """As those of experts that all layers route to."""
    made = mixed("llama")
    named, kept = dict(made.base.named), made.base.others[0]
    first = made.mlps[Mlp(2)][0]
    shared = {**named, first: kept}
    others = tuple(kept if digest == named[first] else digest for digest in made.base.others)
    base = replace(made.base, named=tuple(shared.items()), others=others)
    check_pair(base, made.linear, made.plan, made.mlps)
