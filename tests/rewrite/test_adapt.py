"""Weights of a graph are changed where they are, once each, in its precision and orientation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import BuildError
from nbl_export.graph.io import scratch_copy
from nbl_export.linearize.plan import LinearLayer
from nbl_export.rewrite.adapt import merge_adapters
from nbl_export.rewrite.confirm import check_layers
from nbl_export.rewrite.replace import proven_regions
from nbl_export.rewrite.routers import places_of, routers, shortfalls, tell, told_ranks
from nbl_export.runtime.intermediates import compute_tensors
from tests.finished import Experts, another, swap_experts
from tests.linearize.made import adapter_for

RNG = np.random.default_rng(0)
WEIGHT, OTHER = (RNG.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def graph(**weights: Any) -> ir.Model:
    """A graph with ``weights`` as initializers, and one more of their shape in a Constant node."""
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()]
    constant = ir.node("Constant", [], {"value": ir.tensor(OTHER, name="other")})
    made = ir.Graph([], constant.outputs, nodes=[constant], initializers=values, opset_imports={"": 23})
    return ir.Model(made, ir_version=10)


def weight_of(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_is_changed_in_its_own_dtype_and_orientation(dtype: Any, turned: bool) -> None:
    adapter = adapter_for(WEIGHT)
    stored = np.ascontiguousarray((WEIGHT.T if turned else WEIGHT).astype(dtype))
    untouched = OTHER.T.astype(dtype).copy() if turned else OTHER.astype(dtype)
    model = graph(w=stored, near=untouched)
    merge_adapters(model, {"mlp.weight": adapter})
    change = adapter.up.astype(np.float64) @ adapter.down
    expected = stored.astype(np.float64) + (change.T if turned else change)
    found = weight_of(model, "w")
    assert found.dtype == np.dtype(dtype) and found.shape == stored.shape
    assert np.allclose(found.astype(np.float64), expected, rtol=1e-2 if dtype != np.float32 else 1e-6)
    assert np.array_equal(weight_of(model, "near"), untouched)


def test_a_weight_in_a_constant_node_is_found() -> None:
    model = graph()
    adapter = adapter_for(OTHER)
    merge_adapters(model, {"mlp.weight": adapter})
    (node,) = model.graph
    assert np.allclose(node.attributes["value"].as_tensor().numpy(), OTHER + adapter.up @ adapter.down)


@pytest.mark.parametrize("times", [0, 2])
def test_a_weight_that_is_not_there_once_is_refused(times: int) -> None:
    model = graph(**{f"w{i}": WEIGHT for i in range(times)}, near=WEIGHT + 1e-3)
    with pytest.raises(
        BuildError, match=rf"mlp\.weight, which the graph contains {times} times.*--repair-rank 0"
    ):
        merge_adapters(model, {"mlp.weight": adapter_for(WEIGHT)})


SCORES = np.array([[4.0, 3.0, 1.0], [5.0, 1.0, 2.0]], np.float32)


def routed(axis: int = -1, shape: str = "n, 3") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[{shape}] s, int64[1] k) => (float[a, b] w) '
        f"{{ v, i = TopK <axis = {axis}> (s, k) w = Add (v, v) }}"
    )


def test_a_router_is_found_with_its_scores_and_places() -> None:
    (router,) = routers(routed())
    assert places_of(router) == "i"


def test_places_that_are_fed_are_weighed_by_the_graphs_own_scores() -> None:
    model = routed()
    tell(model)
    feeds = {"s": SCORES, "k": np.array([2]), "i": np.array([[2, 0], [1, 2]])}
    (found,) = compute_tensors(model, ["w"], [feeds])
    assert found["w"].tolist() == [[2, 8], [2, 4]]


@pytest.mark.parametrize(
    ("routes", "model", "ranks"),
    [
        ({0: (2, 2)}, routed(), {"i": 2}),
        ({0: (2, 2)}, routed(shape="1, n, 3"), {"i": 3}),
        ({0: (2, 2)}, routed(axis=0), {}),
        ({0: (2, 2), 1: (2, 2)}, routed(), {}),
        ({1: (2, 2)}, routed(), {}),
        ({}, routed(), {}),
        ({0: (2, 4, 2)}, routed(), {}),
    ],
)
def test_all_are_told_or_none(
    routes: dict[int, tuple[int, ...]], model: ir.Model, ranks: dict[str, int]
) -> None:
    assert told_ranks(model, {n: np.zeros(s, np.int64) for n, s in routes.items()}) == ranks


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


@pytest.mark.parametrize(
    ("precision", "which"),
    [("fp16", ""), ("fp16", "experts"), ("bf16", "self_attn"), ("bf16", "mlp.gate.")],
)
def test_another_fine_tune_is_refused(experts: Experts, precision: str, which: str) -> None:
    with pytest.raises(BuildError, match="not proven") as caught:
        proven_regions(experts.graph(precision), another(experts, REFUSED_FROM[precision][which], which))
    assert "not of the model" in str(caught.value) and "\n" not in str(caught.value)


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
    proofs = {i: p.tensors for i, p in proven_regions(experts.graph(precision), plan).proofs.items()}
    linear = plan.layers[1]
    for number, wrong in enumerate(
        (LinearLayer(linear.w * np.float32(1.1), linear.b), LinearLayer(linear.w, np.zeros_like(linear.b)))
    ):
        path = experts.rewritten(precision, tmp_path / str(number), replace(plan, layers={1: wrong}))
        (check,) = check_layers(path, proofs, plan)
        assert "differs by" in check.failure


def test_a_shortfall_by_hand() -> None:
    routes = {0: np.array([[0, 1], [2, 1]])}
    scores = np.array([[4.0, 3.0, 1.0], [5.0, 1.0, 2.0]], np.float32)
    after = scores + np.float32(0.25)
    ((short, allowed),) = shortfalls(["s"], routes, [{"s": scores}])
    assert short == 1.0 > allowed
    for moved, room, most in ((after[None], 3.0, 0.75), (after, 4.0, 1.0)):
        own = scores if moved.ndim == 2 else scores[None]
        assert shortfalls(["s"], routes, [{"s": own}], [[{"s": moved}]], room) == [(1.0, pytest.approx(most))]
