"""Proofs of a mixture of experts in half precision: right graphs hold closely, wrong ones are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph, scratch_copy
from nbl_export.linearize.plan import LinearLayer, load_plan, save_plan
from nbl_export.rewrite.confirm import check_layers
from nbl_export.rewrite.replace import proven_regions
from nbl_export.rewrite.routing import router_proofs, told_scores
from tests.experts import Experts, another, swap_experts

HALVES = ("fp16", "bf16")
# The relative noise of the weights with such names: refused from there on. The experts of so shallow a model move its
# streams little, and its routers move them through the weights of experts alone.
REFUSED_FROM = {
    "fp16": {"": 2e-3, "self_attn": 2e-3, "experts": 2e-2, "mlp.gate.": 4e-2},
    "bf16": {"": 2e-2, "self_attn": 2e-2, "experts": 0.2, "mlp.gate.": 0.1},
}


@pytest.mark.parametrize("precision", HALVES)
def test_tokens_that_rounding_sends_elsewhere_are_told_where_to_go(experts: Experts, precision: str) -> None:
    """Without being told, the errors behind the first router are those of other experts, and so is what is allowed."""
    path, plan = experts.graph(precision), experts.plan
    proofs = proven_regions(path, plan).proofs
    untold = proven_regions(path, replace(plan, probe_routes={})).proofs
    for layer in (1, 2):
        assert 0.2 < proofs[layer].input_error / proofs[layer].allowed.u < 1
    assert proofs[2].input_error < untold[2].input_error / 1.5
    assert proofs[0] == replace(untold[0], u=proofs[0].u, y=proofs[0].y)  # nothing is routed before it
    assert [p.output_error for p in proofs.values()] == [p.output_error for p in untold.values()]


@pytest.mark.parametrize("which", ["", "self_attn", "experts", "mlp.gate."])
@pytest.mark.parametrize("precision", HALVES)
def test_another_fine_tune_is_refused(experts: Experts, precision: str, which: str) -> None:
    with pytest.raises(BuildError, match="not proven") as caught:
        proven_regions(experts.graph(precision), another(experts, REFUSED_FROM[precision][which], which))
    assert "not of the model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", HALVES)
def test_the_activations_of_a_neighbouring_layer_are_refused(experts: Experts, precision: str) -> None:
    plan = experts.plan
    for other in (0, 2):
        for wrong in (
            replace(plan, probe_u={**plan.probe_u, 1: plan.probe_u[other]}),
            replace(plan, probe_y={**plan.probe_y, 1: plan.probe_y[other]}),
        ):
            with pytest.raises(BuildError, match="Layer 1 is not proven"):
                proven_regions(experts.graph(precision), wrong)


@pytest.mark.parametrize("precision", HALVES)
def test_a_router_that_prefers_other_experts_is_refused(experts: Experts, precision: str) -> None:
    """By its scores, although it is told the right choices; so is a plan that has others."""
    with (
        scratch_copy(experts.graph(precision), swap_experts) as wrong,
        pytest.raises(BuildError, match="not proven"),
    ):
        proven_regions(wrong, experts.plan)
    routes = {**experts.plan.probe_routes, 2: (experts.plan.probe_routes[2] + 2) % 4}
    with pytest.raises(BuildError, match="fall short in its router 2 by"):
        proven_regions(experts.graph(precision), replace(experts.plan, probe_routes=routes))


@pytest.mark.parametrize("precision", HALVES)
def test_a_scaled_w_and_a_dropped_bias_are_refused(experts: Experts, precision: str, tmp_path: Path) -> None:
    plan = experts.plan
    proofs = proven_regions(experts.graph(precision), plan).proofs
    linear = plan.layers[1]
    for number, wrong in enumerate(
        (LinearLayer(linear.w * np.float32(1.1), linear.b), LinearLayer(linear.w, np.zeros_like(linear.b)))
    ):
        path = experts.rewritten(precision, tmp_path / str(number), replace(plan, layers={1: wrong}))
        (check,) = check_layers(path, proofs, plan)
        assert "differs by" in check.failure


def test_a_plan_keeps_what_routers_have_chosen(experts: Experts, tmp_path: Path) -> None:
    plan = experts.plan
    tokens = len(plan.probe_y[0])
    assert {number: taken.shape for number, taken in plan.probe_routes.items()} == dict.fromkeys(
        range(3), (tokens, 2)
    )
    save_plan(tmp_path / "plan.json", plan)
    kept = load_plan(tmp_path / "plan.json").probe_routes
    assert all(np.array_equal(kept[number], taken) for number, taken in plan.probe_routes.items())


def test_a_graph_with_other_routers_is_not_told(experts: Experts) -> None:
    path, plan = experts.graph("fp16"), experts.plan
    assert len(told_scores(path, plan)) == 3
    fewer = replace(plan, probe_routes={0: plan.probe_routes[0]})
    assert told_scores(path, fewer) == told_scores(path, replace(plan, probe_routes={})) == []
    assert len([n for n in load_graph(path).graph if n.op_type == "TopK"]) == 3


def test_a_shortfall_by_hand(experts: Experts) -> None:
    plan = replace(experts.plan, probe_routes={0: np.array([[0, 1], [2, 1]])})
    scores = np.array([[4.0, 3.0, 1.0], [5.0, 1.0, 2.0]], np.float32)
    after = scores + np.float32(0.25)
    (exact,) = router_proofs(["s"], plan, [{"s": scores}])
    assert (exact.tokens, exact.differing, exact.shortfall) == (2, 1, 1.0) and not exact.holds
    (one,) = router_proofs(["s"], plan, [{"s": scores[None]}], [[{"s": after[None]}]], room=3.0)
    assert one.allowed == pytest.approx(0.75) and not one.holds
    (more,) = router_proofs(["s"], plan, [{"s": scores}], [[{"s": after}]], room=4.0)
    assert more.holds
