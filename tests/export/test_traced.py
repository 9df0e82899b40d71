"""What becomes of a traced graph: one GroupQueryAttention a layer, norms of sums, the precision that ranges allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from nbl_export.errors import InputError
from nbl_export.export import torch as half_module
from nbl_export.export.forms import CONCAT, SHARED
from nbl_export.export.fused import fuse_norms, group_queries
from nbl_export.export.torch import ranges_of, save_in_precision, trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.operators import SKIP_NORMS
from nbl_export.graph.precision import PRECISIONS
from tests.families import HEADS, unsaved
from tests.fixtures_graph import cpu_session, ragged_rows
from tests.graph.by_hand import parsed, weight_types

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
    norm: str, stream: str = "h", summand: str = "y", shape: tuple[Any, ...] = ("b", "s", D), axis: int = -1
) -> ir.Model:
    """h, y ─► Add ─► norm, and a block that reads h; the sum is an output too. ``summand`` may be the bias."""
    inputs = "sum, scale" + (", bias" if norm == "LayerNormalization" else "")
    given = f"float[b,s,{D}] h, float[{','.join(map(str, shape))}] y"
    text = f"""g ({given}) => (float[b,s,{D}] normed, float[b,s,{D}] sum, float[b,s,{D}] block) {{
        block = Neg(h)
        sum = Add({stream}, {summand})
        normed = {norm}<axis = {axis}, epsilon = 0.001>({inputs})
    }}"""
    return parsed(text, scale=SCALE, bias=BIAS)


def run(graph: ir.Model) -> list[Any]:
    session = cpu_session(graph)
    return list(session.run(["normed", "sum"], {v.name: GIVEN[v.name] for v in graph.graph.inputs}))


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_the_numbers_are_the_same(norm: str) -> None:
    apart, fused = summed(norm), summed(norm)
    assert fuse_norms(fused) == 1
    _, node = fused.graph
    assert (node.domain, node.op_type) in SKIP_NORMS
    for found, expected in zip(run(fused), run(apart), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_of_two_norms_of_a_stream_one_has_the_sum() -> None:
    """As where attention and MLP read one stream side by side: it must not become two."""
    graph = summed("RMSNormalization")
    twice = ir.node("RMSNormalization", graph.graph[-1].inputs, graph.graph[-1].attributes)
    twice.outputs[0].name, twice.outputs[0].type = "again", graph.graph.outputs[0].type
    graph.graph.append(twice)
    graph.graph.outputs.append(twice.outputs[0])
    assert fuse_norms(graph) == 1
    assert [node.op_type for node in graph.graph] == [
        "Neg",
        "SkipSimplifiedLayerNormalization",
        "RMSNormalization",
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"stream": "block"},  # of two branches
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
    assert [node.op_type for node in graph.graph] == ["Neg", "Add", "RMSNormalization"]


# ranges and precisions ---------------------------------------------------------------------------

VOCAB, BLOCKS = 260, 4


# By hand -----------------------------------------------------------------------------------------

STEPS = """steps (int64[b,s] input_ids) => (float[b,s] logits) {
    x = Cast<to = 1>(input_ids)
    low = Sub(x, ten)
    y = Mul(low, scale)
    parity = Mod(input_ids, two)
    logits = Relu(y)
}"""
FEW = [np.array([3, 8, 12], np.int32), np.array([5, 1], np.int32)]


def reach(tmp_path: Path, scale: Any, rows: Sequence[Any] = FEW) -> dict[str, float]:
    constants = {"ten": np.float32(10), "scale": np.asarray(scale, np.float32), "two": np.array(2)}
    save_graph(parsed(STEPS, **constants), tmp_path / "model.onnx")
    return dict(ranges_of(load_graph(tmp_path / "model.onnx"), rows))


def test_negative_numbers_and_padding_count(tmp_path: Path) -> None:
    # Padded with token 0: low is -7, -2, 2 and 0 - 10, -5, -9; whole numbers are nobody's matter.
    assert reach(tmp_path, 0.5) == {"x": 12.0, "low": 10.0, "y": 5.0, "logits": 1.0}
    assert reach(tmp_path, 0.5, [FEW[0]]) == {"x": 12.0, "low": 7.0, "y": 3.5, "logits": 1.0}


def test_a_large_number_among_many_rows_is_found(tmp_path: Path) -> None:
    rows = ragged_rows((200, 150, 90), 1000)
    rows[1][77] = 30_000
    assert reach(tmp_path, 1, rows)["low"] == 29_990


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_infinite_wherever_it_stands(tmp_path: Path, place: int) -> None:
    assert reach(tmp_path, 3e38)["y"] == float("inf")
    text = (
        "nan (int64[b,s] input_ids) => (float[b,s] logits) { x = Cast<to = 1>(input_ids)\n logits = Sqrt(x) }"
    )
    save_graph(parsed(text), tmp_path / "model.onnx")
    row = np.array([4, 9, 16], np.int32)
    row[place] = -1
    found = dict(ranges_of(load_graph(tmp_path / "model.onnx"), [row]))
    assert found == {"x": max(row), "logits": float("inf")}


# in a precision ----------------------------------------------------------------------------------


FLOAT = onnx.TensorProto.FLOAT
HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


# float16 on rows ---------------------------------------------------------------------------------

DECODER = """decoder (int64[b,s] input_ids) => (float[b,s,4] logits) {
    e = Gather(table, input_ids)
    h = MatMul(e, map)
    r = Relu(h)
    logits = MatMul(r, head)
}"""


def decoder() -> Any:
    """Token 5's embedding is 200; its h is 8 · 200 · 20 = 32,000. Every other token's is a 200th of that."""
    table = np.ones((10, 8), np.float32)
    table[5] = 200
    weights = {"table": table, "map": np.full((8, 4), 20), "head": np.eye(4) / 1000}
    return parsed(DECODER, **{n: w.astype(np.float32) for n, w in weights.items()})


@pytest.mark.parametrize(("token", "wide"), [(5, True), (4, False)])
@pytest.mark.parametrize("where", [(0, 0), (1, 2)], ids=str)
def test_the_rows_decide_what_stays_float32(
    tmp_path: Path, token: int, wide: bool, where: tuple[int, int]
) -> None:
    rows = [np.array([1, 2, 3, 1], np.int32), np.array([7, 8, 9], np.int32)]
    rows[where[0]][where[1]] = token
    _, kept = save_in_precision(decoder(), tmp_path / "model.onnx", PRECISIONS["fp16"], rows)
    assert [k.op for k in kept] == ["MatMul", "Relu", "MatMul"] * wide
    assert [k.reason for k in kept][:2] == ["h reaches 3.2e+04 on real text"] * 2 * wide
    types = weight_types(onnx.load(str(tmp_path / "model.onnx")))
    other = FLOAT if wide else HALF["fp16"]
    assert types == {"table": HALF["fp16"], "map": other, "head": other}


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_float32s_range_needs_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_args: Any, **_more: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(half_module, "ranges_of", fail)
    files, kept = save_in_precision(decoder(), tmp_path / "new" / "model.onnx", PRECISIONS[name], [])
    assert kept == [] and files == [tmp_path / "new" / "model.onnx"]
    expected = HALF["bf16"] if name == "bf16" else FLOAT
    assert set(weight_types(onnx.load(str(files[0]))).values()) == {expected}
