"""W stored like its neighbours; weights of a graph changed where they are, once each; routers that are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nbl_export.blocks import Mlp
from nbl_export.errors import BuildError
from nbl_export.export.experts import MOE
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.graph.integers import pack, quantize_blocks, to_integers
from nbl_export.graph.io import load_graph, save_graph, scratch_copy
from nbl_export.graph.operators import remove_unused, upstream
from nbl_export.graph.precision import PRECISIONS, QUANTIZED, to_precision
from nbl_export.linearize.plan import LinearLayer
from nbl_export.rewrite.adapt import merge_adapters
from nbl_export.rewrite.confirm import check_layers
from nbl_export.rewrite.quantize import product
from nbl_export.rewrite.replace import proven_regions
from nbl_export.rewrite.routers import places_of, routers, shortfalls, tell, told_ranks
from nbl_export.runtime.intermediates import compute_tensors
from tests.finished import Experts, another, swap_experts
from tests.fixtures_graph import cpu_session
from tests.graph.by_hand import DYNAMIC, MS, D, dequantized, dynamic, graph, matrix, n_bits
from tests.linearize.made import adapter_for

# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32])
def test_every_value_is_met_within_half_a_step(bits: int, symmetric: bool, block: int) -> None:
    w = matrix(5, 40)  # the last block of 32 is filled up
    blocks = quantize_blocks(w, bits, block, symmetric)
    count = -(-40 // block)
    assert blocks.numbers.shape == (5, count, block) and blocks.scales.shape == (5, count)
    assert blocks.numbers.max() <= (1 << bits) - 1
    found = blocks.values().reshape(5, -1)[:, :40]
    step = np.repeat(np.abs(blocks.scales), block, axis=1)[:, :40]
    # Symmetric numbers reach one step less on the side away from the largest value.
    assert (np.abs(found - w) <= step * (1.0 if symmetric else 0.5) * 1.001).all()
    assert not (symmetric and (blocks.zeros != 1 << (bits - 1)).any())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_are_those_of_onnxruntimes_own_quantizer(bits: int, symmetric: bool) -> None:
    from onnxruntime.capi import _pybind_state as native

    w, block = matrix(D, 64), 32
    rows, count = D, 64 // block
    packed = np.zeros((rows, count, block * bits // 8), dtype=np.uint8)
    scales = np.zeros(rows * count, dtype=np.float32)
    zeros = np.zeros(rows * -(-count * bits // 8), dtype=np.uint8)
    quantize = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    quantize(packed, np.ascontiguousarray(w.T), scales, zeros, block, rows, 64, symmetric)
    blocks = quantize_blocks(w, bits, block, symmetric)
    np.testing.assert_allclose(blocks.scales.reshape(-1), scales, rtol=1e-6)
    ours = pack(blocks.numbers, bits)
    # Values that lie in the middle between two numbers are rounded up there, to even here.
    assert (ours != packed).mean() < 0.002
    if not symmetric:
        assert (pack(blocks.zeros, bits).reshape(-1) != zeros).mean() < 0.02


def test_packing_puts_the_first_number_lowest() -> None:
    numbers = np.array([[1, 2, 3]], dtype=np.uint8)
    assert pack(numbers, 4).tolist() == [[0x21, 0x03]]
    assert pack(numbers, 2).tolist() == [[0b111001]]
    assert pack(numbers, 8).tolist() == [[1, 2, 3]]


# Products ----------------------------------------------------------------------------------------


def replaced(model: ir.Model, w: Any) -> dict[str, Any]:
    """Let ``y`` be x · wᵀ, stored like the neighbour's weight; returns the new initializers."""
    neighbour = next(n for n in model.graph if n.name == "neighbour")
    made: dict[str, Any] = {}

    def initialize(
        name: str,
        numbers: Any | Callable[[], Any],
        dtype: ir.DataType,
        shape: tuple[int, ...] | None = None,
    ) -> ir.Value:
        array = numbers() if callable(numbers) else numbers
        assert shape is None or array.shape == shape
        made[name] = tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=f"new.{name}")
        value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(dtype))
        model.graph.register_initializer(value)
        return value

    x = next(v for v in model.graph.inputs if v.name == "x")
    nodes = product(x, lambda: w, w.shape, ir.DataType.FLOAT, neighbour, initialize)
    neighbour.append(nodes)
    model.graph.outputs[0] = nodes[-1].outputs[0]
    nodes[-1].outputs[0].name = "result"
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return made


def run(model: ir.Model, x: Any) -> Any:
    # Its optimizer would round the activations behind a DequantizeLinear to 8 bits.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    runner = cpu_session(model, options)
    return runner.run(["result"], {"x": x})[0]


N_BITS = [
    pytest.param(
        bits, block, zeros, rank, id=f"{bits} bits, {block}, {'zeros' if zeros else 'none'}, {rank}d"
    )
    for bits in (4, 8)
    for block in (16, 32)
    for zeros in (False, True)
    for rank in (1, 2)
]


@pytest.mark.parametrize(("bits", "block", "zeros", "rank"), N_BITS)
def test_a_product_of_n_bits_is_what_its_numbers_say(bits: int, block: int, zeros: bool, rank: int) -> None:
    model, w = n_bits(bits, block, zeros, rank, accuracy=None), matrix()
    made = replaced(model, w)
    assert set(made) == {"weight_quant", "weight_scales", *(["weight_zeros"] if zeros else [])}
    x = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32)
    stands_for = quantize_blocks(w, bits, block, not zeros).values().reshape(D, -1)[:, :D]
    np.testing.assert_allclose(run(model, x), x @ stands_for.T, rtol=0, atol=1e-4)
    near = 0.25 if bits == 4 else 0.02
    assert np.linalg.norm(run(model, x) - x @ w.T) < near * np.linalg.norm(x @ w.T)
    for name, tensor in made.items():
        old = {"weight_quant": "b", "weight_scales": "s", "weight_zeros": "z"}[name]
        twin = model.graph.initializers[old].const_value
        assert twin is not None and (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)


def test_attributes_follow_the_neighbours() -> None:
    model = n_bits(4, 16, False, 2, accuracy=4)
    replaced(model, matrix())
    new = model.graph.outputs[0].producer()
    assert new is not None and new.op_type == "MatMulNBits" and new.domain == MS
    found = {name: attribute.as_int() for name, attribute in new.attributes.items()}
    assert found == {"K": D, "N": D, "bits": 4, "block_size": 16, "accuracy_level": 4}


DEQUANTIZED = [
    pytest.param(dtype, block, zeros, id=f"{TensorProto.DataType.Name(dtype)}, {block}, {zeros}")
    for dtype in (TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8)
    for block in (16, None)
    for zeros in (False, True)
]


@pytest.mark.parametrize(("dtype", "block", "zeros"), DEQUANTIZED)
def test_a_weight_behind_a_dequantize_linear(dtype: int, block: int | None, zeros: bool) -> None:
    model, w = dequantized(dtype, block, zeros), matrix()
    made = replaced(model, w)
    assert made["weight_quant"].dtype == ir.DataType(dtype) and tuple(made["weight_quant"].shape) == (D, D)
    assert tuple(made["weight_scales"].shape) == ((D // block, D) if block else (D,))
    # Numbers without a sign need a zero point to mean anything below zero.
    unsigned = dtype in (TensorProto.UINT4, TensorProto.UINT8)
    assert ("weight_zeros" in made) == (zeros or unsigned)
    x = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32)
    bits = 4 if dtype in (TensorProto.INT4, TensorProto.UINT4) else 8
    near = {4: 0.3, 8: 0.02}[bits]
    assert np.linalg.norm(run(model, x) - x @ w.T) < near * np.linalg.norm(x @ w.T)
    assert (made["weight_scales"].numpy() > 0).all()
    stands_for = quantize_blocks(w, bits, block or D, not zeros, positive=True).values().reshape(D, -1)[:, :D]
    np.testing.assert_allclose(run(model, x), x @ stands_for.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("op", "signed", "each"), DYNAMIC)
def test_a_product_whose_activations_are_quantized_too(op: str, signed: bool, each: bool) -> None:
    model, w = dynamic(op, signed, each), matrix()
    w[3] *= 20  # one output far larger than the others
    made = replaced(model, w)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in made.items()} == {
        "weight_quant": (ir.DataType.INT8 if signed else ir.DataType.UINT8, (D, D)),
        "weight_scale": (ir.DataType.FLOAT, (D,) if each else ()),
        "weight_zero": (ir.DataType.INT8 if signed else ir.DataType.UINT8, (D,) if each else ()),
    }
    numbers, zeros = (made[n].numpy().astype(np.float32) for n in ("weight_quant", "weight_zero"))
    stands_for = (numbers - zeros) * made["weight_scale"].numpy()
    assert np.abs(stands_for - w.T).max() <= made["weight_scale"].numpy().max() * 1.001
    x = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32)
    small = [i for i in range(D) if i != 3]
    found, expected = run(model, x)[:, small], (x @ w.T)[:, small]
    # With one scale for all the large output costs the small ones their digits.
    assert np.linalg.norm(found - expected) < (0.03 if each else 0.3) * np.linalg.norm(expected)
    np.testing.assert_allclose(run(model, x), x @ stands_for, rtol=0, atol=0.02 * np.abs(x @ w.T).max())


# Telling -----------------------------------------------------------------------------------------


def test_what_cannot_be_imitated_is_refused() -> None:
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "w", "a"],
        ["y"],
        domain=MS,
        name="neighbour",
        K=D,
        N=D,
        block_size=16,
        quant_type=1,
    )
    weights = {"w": np.zeros(D * D // 2, np.uint8), "a": np.ones(D * D // 16, np.float32)}
    with pytest.raises(
        BuildError, match="neighbour is a MatMulBnb4, and nbl-export cannot quantize weights in its format"
    ):
        replaced(graph([node], weights), matrix())
    model = n_bits(4, 16, True, 1, None)
    model.graph.initializers["z"].dtype = ir.DataType.FLOAT
    with pytest.raises(BuildError, match="has zero points of FLOAT"):
        replaced(model, matrix())


# weights that are changed ------------------------------------------------------------------------

RNG = np.random.default_rng(0)
WEIGHT, OTHER = (RNG.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def graph_with(**weights: Any) -> ir.Model:
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
    model = graph_with(w=stored, near=untouched)
    merge_adapters(model, {"mlp.weight": adapter})
    change = adapter.up.astype(np.float64) @ adapter.down
    expected = stored.astype(np.float64) + (change.T if turned else change)
    found = weight_of(model, "w")
    assert found.dtype == np.dtype(dtype) and found.shape == stored.shape
    assert np.allclose(found.astype(np.float64), expected, rtol=1e-2 if dtype != np.float32 else 1e-6)
    assert np.array_equal(weight_of(model, "near"), untouched)


def test_a_weight_in_a_constant_node_is_found() -> None:
    model = graph_with()
    adapter = adapter_for(OTHER)
    merge_adapters(model, {"mlp.weight": adapter})
    (node,) = model.graph
    assert np.allclose(node.attributes["value"].as_tensor().numpy(), OTHER + adapter.up @ adapter.down)


@pytest.mark.parametrize("times", [0, 2])
def test_a_weight_that_is_not_there_once_is_refused(times: int) -> None:
    model = graph_with(**{f"w{i}": WEIGHT for i in range(times)}, near=WEIGHT + 1e-3)
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


def taking(k: int) -> ir.Model:
    model = routed()
    node = ir.node("Constant", [], {"value": ir.tensor(np.array([k]))})
    model.graph.insert_before(model.graph[0], node)
    model.graph[1].replace_input_with(1, node.outputs[0])
    return model


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
        ({0: (2, 2)}, taking(2), {"i": 2}),
    ],
)
def test_all_are_told_or_none(
    routes: dict[int, tuple[int, ...]], model: ir.Model, ranks: dict[str, int]
) -> None:
    assert told_ranks(model, {n: np.zeros(s, np.int64) for n, s in routes.items()}) == ranks


def test_a_router_that_takes_another_number_of_experts_is_refused() -> None:
    with pytest.raises(BuildError, match="its router 0 takes 3 experts of a token, PyTorch's 2; this graph"):
        told_ranks(taking(3), {0: np.zeros((2, 2), np.int64)})


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


def in_the_operator(model: ir.Model) -> list[ir.Node]:
    """Let every mixture of ``model`` choose by the scores themselves; returns the mixtures."""
    mixtures = [node for node in model.graph if node.op_type == "MoE"]
    for node, router in zip(mixtures, routers(model), strict=True):
        makers = (value.producer() for value in upstream(router.inputs[0]))
        softmax = next(maker for maker in makers if maker is not None and maker.op_type == "Softmax")
        scores, y = softmax.inputs[0], node.outputs[0]
        assert scores is not None
        cast = scores.producer()
        if cast is not None and cast.op_type == "Cast":
            scores = cast.inputs[0]
        node.replace_input_with(1, scores)
        node.attributes["normalize_routing_weights"] = ir.AttrInt64("normalize_routing_weights", 0)
        (scaled,) = [use.node for use in y.uses()]
        ir.convenience.replace_all_uses_with(scaled.outputs[0], y)
    remove_unused(model)
    return mixtures


def exchange(value: ir.Value | None, axis: int) -> None:
    assert value is not None and value.const_value is not None
    array = value.const_value.numpy().copy()
    order = [3, 1, 2, 0]  # the first two are nearly alike
    value.const_value = ir.tensor(np.take(array, order, axis), name=value.const_value.name)


def other_experts(mixture: ir.Node) -> None:
    for index in (2, 4):
        exchange(mixture.inputs[index], 0)


def other_row(mixture: ir.Node) -> None:
    makers = (value.producer() for value in upstream(mixture.inputs[1]))
    product = next(maker for maker in makers if maker is not None and maker.op_type in ("MatMul", "Gemm"))
    exchange(product.inputs[1], 0 if product.op_type == "Gemm" else 1)


def one_more(mixture: ir.Node) -> None:
    mixture.attributes["k"] = ir.AttrInt64("k", mixture.attributes["k"].as_int() + 1)


def of_shares(mixture: ir.Node) -> None:
    mixture.attributes["normalize_routing_weights"] = ir.AttrInt64("normalize_routing_weights", 1)


@pytest.mark.parametrize("precision", ["fp32", *HALVES, *QUANTIZED])
def test_a_choice_inside_an_operator_is_proven_as_any(
    experts: Experts, precision: str, tmp_path: Path
) -> None:
    graph = trace(experts.model, replace(FORMS["concat"], experts=MOE))
    in_the_operator(graph)
    save_graph(graph, float32 := tmp_path / "model.onnx")

    def stored(change: Callable[[ir.Node], None] | None = None) -> Path:
        model = load_graph(float32)
        if change:
            change(next(node for node in model.graph if node.op_type == "MoE"))
        if precision in QUANTIZED:
            to_integers(model, QUANTIZED[precision].bits)
        else:
            to_precision(model, PRECISIONS[precision], {})
        (path := tmp_path / (change.__name__ if change else "right") / "model.onnx").parent.mkdir()
        save_graph(model, path)
        return path

    # Integers move a stream more than experts do; what a mixture itself computes shows them.
    plan = experts.case.plan((*range(3), *map(Mlp, range(3)))) if precision in QUANTIZED else experts.plan
    assert set(proven_regions(stored(), plan).proofs) >= {0, 1, 2, *plan.layers}
    for change in (other_experts, other_row, one_more, of_shares):
        with pytest.raises(BuildError, match="not proven"):
            proven_regions(stored(change), plan)


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
