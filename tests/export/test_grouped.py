"""--kv-cache shared: one GroupQueryAttention a layer and norms of sums, that compute what the model does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.errors import InputError
from nbl_export.export.forms import CONCAT, SHARED
from nbl_export.export.fused import fuse_norms, group_queries
from nbl_export.export.torch import trace
from nbl_export.graph.operators import SKIP_NORMS
from tests.families import HEADS, unsaved
from tests.fixtures_graph import cpu_session

LONGEST, LAYERS = 256, 2
FAMILY = "llama"


def small(family: str, **changes: Any) -> Any:
    """The model of the family with two layers: each takes seconds."""
    return unsaved(family, num_hidden_layers=LAYERS, **changes)


@pytest.fixture(scope="module")
def model() -> Any:
    return small(FAMILY).eval()


@pytest.fixture(scope="module")
def traced(model: Any) -> Any:
    return ir.to_proto(trace(model, CONCAT))


@pytest.fixture
def growing(traced: Any) -> ir.Model:
    """The model's graph with a growing cache, for a test to change."""
    return ir.from_proto(traced)


@pytest.fixture(scope="module")
def shared(model: Any) -> ir.Model:
    return trace(model, SHARED)


def operators(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


def windows(graph: ir.Model) -> list[int | None]:
    nodes = [n for n in graph.graph if n.op_type == "GroupQueryAttention"]
    sizes = [n.attributes.get("local_window_size") for n in nodes]
    return [None if size is None else size.as_int() for size in sizes]


def test_projections_reach_the_operator_as_they_are(shared: ir.Model) -> None:
    ops = operators(shared)
    assert ops["GroupQueryAttention"] == LAYERS and ops["RotaryEmbedding"] == 2 * LAYERS
    # No cache is copied, no mask is made, and nothing is turned; one Reshape is that of the last states.
    assert not ops.keys() & {"Attention", "Concat", "Transpose", "And", "LessOrEqual", "GatherND", "Where"}
    assert ops["Reshape"] == 1
    # Every sum of the residual stream is made where it is normalized; the first norm is of no sum.
    assert (ops["SkipSimplifiedLayerNormalization"], ops["RMSNormalization"], ops["Add"]) == (
        2 * LAYERS,
        1,
        0,
    )


def test_windows_groups_and_scale_are_the_models(shared: ir.Model) -> None:
    assert windows(shared) == [None] * LAYERS
    graph = trace(small("gemma3-text", query_pre_attn_scalar=25), SHARED)
    assert windows(graph) == [8, None]
    for node in (n for n in graph.graph if n.op_type == "GroupQueryAttention"):
        assert (node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()) == (HEADS, 2)
        assert node.attributes["scale"].as_float() == pytest.approx(0.2)


# Refusals ----------------------------------------------------------------------------------------


def refusal(graph: ir.Model) -> str:
    with pytest.raises(InputError) as caught:
        group_queries(graph, LONGEST)
    sentence = str(caught.value)
    assert sentence.endswith(
        "which onnxruntime's GroupQueryAttention does not compute: use --kv-cache concat."
    )
    return sentence.split(",")[0]


def change_mask(graph: ir.Model, layer: int, op: str, *others: ir.Value, **attributes: int) -> None:
    """Let the layer's attention see what ``op`` makes of its mask and ``others``."""
    node = [n for n in graph.graph if n.op_type == "Attention"][layer]
    changed = ir.node(op, [node.inputs[3], *others], attributes)
    changed.outputs[0].name = "changed.mask"
    node.prepend(changed)
    node.replace_input_with(3, changed.outputs[0])


def test_a_mask_that_is_neither_causal_nor_a_window_is_refused(growing: ir.Model) -> None:
    change_mask(growing, 1, "Not")
    assert refusal(growing) == "Layer 1 has a mask that is neither causal nor a sliding window"


def test_a_mask_that_sees_the_next_token_only_in_a_prompt_is_refused(growing: ir.Model) -> None:
    """One step sees what a causal mask sees."""
    true = ir.Value(name="true", const_value=ir.tensor(np.array(True)), shape=ir.Shape([]))
    true.type = ir.TensorType(ir.DataType.BOOL)
    growing.graph.register_initializer(true)
    change_mask(growing, 1, "Or", true)
    assert refusal(growing) == "Layer 1 has a mask that is neither causal nor a sliding window"


def test_numbers_added_to_scores_are_refused(growing: ir.Model) -> None:
    change_mask(growing, 0, "Cast", to=int(ir.DataType.FLOAT))
    assert refusal(growing) == "Layer 0 adds values to its scores"


def test_heads_that_the_operator_does_not_take_are_refused() -> None:
    graph = trace(small(FAMILY, head_dim=12), CONCAT)
    assert refusal(graph) == "Layer 0 has head_dim 12 for keys and 12 for values"


# norms of sums ------------------------------------------------------------------------------------


D = 16
RNG = np.random.default_rng(0)
GIVEN = {name: RNG.standard_normal((2, 5, D), dtype=np.float32) for name in ("h", "y")}
SCALE, BIAS = (RNG.standard_normal(D, dtype=np.float32) for _ in range(2))


def summed(
    norm: str, summand: str = "y", shape: tuple[Any, ...] = ("b", "s", D), **attributes: Any
) -> ir.Model:
    """h, y ─► Add ─► norm; the sum is an output too. ``summand`` may be the constant bias."""
    weights = {"scale": SCALE, "bias": BIAS}
    inputs = ["sum", "scale"] + (["bias"] if norm == "LayerNormalization" else [])
    nodes = [
        helper.make_node("Add", ["h", summand], ["sum"]),
        helper.make_node(norm, inputs, ["normed"], **{"axis": -1, "epsilon": 1e-3, **attributes}),
    ]

    def value(name: str, of: tuple[Any, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, of)

    graph = helper.make_graph(
        nodes,
        "g",
        [value("h", ("b", "s", D)), value("y", shape)],
        [value("normed", ("b", "s", D)), value("sum", ("b", "s", D))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(proto)


def run(graph: ir.Model) -> list[Any]:
    session = cpu_session(graph)
    return list(session.run(["normed", "sum"], {v.name: GIVEN[v.name] for v in graph.graph.inputs}))


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_the_numbers_are_the_same(norm: str) -> None:
    apart, fused = summed(norm), summed(norm)
    assert fuse_norms(fused) == 1
    (node,) = fused.graph
    assert (node.domain, node.op_type) in SKIP_NORMS
    for found, expected in zip(run(fused), run(apart), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"summand": "bias"},  # of a projection: no residual
        {"shape": ("b", 1, D)},  # one row for all tokens
        {"shape": (1, "s", D)},
        {"axis": 1},
    ],
    ids=str,
)
def test_what_is_no_residual_stream_is_left_alone(other: dict[str, Any]) -> None:
    graph = summed("RMSNormalization", **other)
    assert fuse_norms(graph) == 0
    assert [node.op_type for node in graph.graph] == ["Add", "RMSNormalization"]
