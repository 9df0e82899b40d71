"""What is dropped leaves the graph: what added it takes the other summand alone, and everything else stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.errors import InputError
from nbl_export.graph.cache import KV_LAYERS_KEY, LAYERS_KEY, metadata_list
from nbl_export.graph.facts import facts_of
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.summary import DescribedLayer
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite.leave_out import leave_out
from nbl_export.rewrite.replace import drop_layers, rewrite_file
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import gates_for
from tests.families import Calibrated, calibrated
from tests.fixtures_graph import pad_left, plan_by_hand, ragged_rows
from tests.rewrite.by_hand import baseline, prompts
from tests.rewrite.test_replace import assert_computes_the_plan

LAYERS = 5  # stories260K
CHOICES: list[tuple[Block, ...]] = [
    (Span(1, 2), 4),
    (Span(0, 0), Mlp(2), Span(3, 4)),
    (Span(0, 3), Span(4, 4)),
]


@pytest.fixture(scope="module")
def case(stories_folder: Path) -> Calibrated:
    return calibrated(stories_folder)


@pytest.mark.parametrize("blocks", CHOICES, ids=str)
def test_spans_of_a_real_model(
    case: Calibrated, stories_out: Path, tmp_path: Path, blocks: tuple[Block, ...]
) -> None:
    plan, path = case.plan(blocks), tmp_path / "model.onnx"
    assert plan.blocks == tuple(sorted(blocks))
    result = rewrite_file(baseline(stories_out), plan, path)
    rows = prompts(stories_out, (40, 27, 12))
    assert_computes_the_plan(path, case.model, plan, rows, 3)
    with linearized(case.model, plan):
        reference = PastStream(TorchDecoder(case.model, plan.linear_attention))
        found = compare_streams(reference, PastStream(OrtDecoder(path)), rows, 4, gates_for("float32"))
    assert found.failures() == []

    graph = load_graph(path)
    kept = plan.attention_layers
    assert metadata_list(graph, KV_LAYERS_KEY, int) == kept == result.kv_layers
    assert result.after.kv_pairs == result.after.ops.get("Attention", 0) == len(kept)
    assert facts_of(path).linear == tuple(sorted(blocks))
    described = metadata_list(graph, LAYERS_KEY, DescribedLayer)
    assert {r.layer for r in described if r.kind in ("linear", "dropped")} == set(plan.chosen)
    assert {r.layer for r in described if r.kind == "dropped"} == set(plan.dropped)
    assert all((r.input, r.output) == ("", "") for r in described if r.kind == "dropped")
    # A norm goes with all that is dropped, and the sum that it was added in.
    gone = Counter(result.before.ops)
    gone.subtract(result.after.ops)
    assert gone["RMSNormalization"] == len(plan.dropped)
    assert result.after.ops["MatMul"] == 1 + len(plan.layers) + 4 * len(kept) + 3 * (
        LAYERS - sum(isinstance(part, Mlp) for part in plan.chosen)
    )


# compared with what a linear layer gives ----------------------------------------------------------


def without_attention(model: Any, layers: tuple[int, ...], row: Any) -> Any:
    """Logits [sequence, vocab] of transformers' own model whose attention in ``layers`` writes zeros."""
    hooks = [
        model.model.layers[i].self_attn.register_forward_hook(
            lambda _m, _a, output: (torch.zeros_like(output[0]), *output[1:])
        )
        for i in layers
    ]
    try:
        with torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            return model(input_ids=ids, use_cache=False).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layers", [(1, 4), (0, 1, 2, 3, 4)], ids=str)
def test_what_is_left_is_the_model_without_those_layers(
    stories_out: Path, stories_model: Any, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    path = tmp_path / "linear.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan_by_hand(stories_out, layers), path)
    graph = load_graph(path)
    before = len(list(graph.graph))
    drop_layers(graph)
    # A norm, the map's product and sum, and the residual addition.
    assert len(list(graph.graph)) == before - 4 * len(layers)
    save_graph(graph, tmp_path / "dropped.onnx")
    decoder = OrtDecoder(tmp_path / "dropped.onnx")
    rows = ragged_rows((9, 4), 500, seed=7)
    logits = decoder(*pad_left(rows), decoder.empty_past(2)).logits
    for i, row in enumerate(rows):
        expected = without_attention(stories_model, layers, row)
        np.testing.assert_allclose(logits[i, 9 - len(row) :], expected, rtol=0, atol=5e-4)


def test_an_output_that_is_read_by_more_than_a_sum_cannot_be_left_out(stories_out: Path) -> None:
    graph = load_graph(stories_out / "model.onnx")
    y = next(v for n in graph.graph for v in n.outputs if "nbl_linear.output" in str(v.name))
    other = next(n for n in graph.graph if n.op_type == "MatMul" and "nbl_linear" not in str(n.name))
    other.replace_input_with(0, y)
    with pytest.raises(InputError, match=r"layer \d cannot be dropped: .* but read by MatMul"):
        drop_layers(graph)


# single operators --------------------------------------------------------------------------------


HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
D = 4
WEIGHTS = {
    "g": np.linspace(0.5, 2.0, D),
    "beta": np.linspace(-1.0, 1.0, D),
    "c": np.array(0.22),
    "two": np.array(2.0),
    "eps": np.array(1e-5),
}
NORM = "p = Pow(y, two) m = ReduceMean(p, last) e = Add(m, eps) r = Sqrt(e) q = Div(y, r) z = Mul(q, g)"
ADDED = {
    "a sum": "o = Add(x, y)",
    "a sum, the other way": "o = Add(y, x)",
    "scaled": "z = Mul(y, c) o = Add(x, z)",
    "cast": "z = Cast<to: int = 1>(y) o = Add(x, z)",
    "a norm": "z = RMSNormalization(y, g) o = Add(x, z)",
    "a norm of many operators": f"{NORM} o = Add(x, z)",
    "in parallel": "s = Add(y, w) o = Add(x, s)",
    "in two sums": "o1 = Add(x, y) o2 = Add(y, w) o = Mul(o1, o2)",
    "a sum and a norm in one": (
        "n, , , s = com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 0.00001>(x, y, g) o = Mul(n, s)"
    ),
    "its summands the other way": (
        "n, , , s = com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 0.00001>(y, x, g) o = Mul(n, s)"
    ),
    "a sum and a LayerNorm in one": (
        "n, , , s = com.microsoft.SkipLayerNormalization<epsilon: float = 0.00001>(x, y, g, beta) o = Mul(n, s)"
    ),
    "the last norm": "o = com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 0.00001>(x, y, g)",
}
REFUSED = {
    "a bias": ("z = Add(y, beta) o = Add(x, z)", "Add"),
    "a norm with a bias": ("z = LayerNormalization(y, g, beta) o = Add(x, z)", "LayerNormalization"),
    "a bias of a norm of sums": (
        "n, , , s = com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 0.00001>(x, y, g, beta) "
        "o = Mul(n, s)",
        "SkipSimplifiedLayerNormalization",
    ),
    "beside it": ("o = Concat<axis: int = -1>(x, y)", "Concat"),
}


def block(nodes: str) -> ir.Model:
    """x + y in some form, y = 2 u of the block that is left out, w of another one."""
    text = f"{HEADER} g (float[2, 3, {D}] x, float[2, 3, {D}] u, float[2, 3, {D}] w) => (float[a, b, d] o) "
    proto = onnx.parser.parse_model(f"{text} {{ y = Mul(u, two) {nodes} }}")
    arrays = {name: array.astype(np.float32) for name, array in WEIGHTS.items()} | {"last": np.array([-1])}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    return ir.from_proto(proto)


def output_of(model: ir.Model) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == "y")


def run(model: ir.Model, u: float) -> Any:
    generator = np.random.default_rng(0)
    feeds = {name: generator.normal(size=(2, 3, D)).astype(np.float32) for name in ("x", "w")}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    given = {i.name for i in session.get_inputs()}
    feeds["u"] = np.full((2, 3, D), u, np.float32)
    (found,) = session.run(None, {name: array for name, array in feeds.items() if name in given})
    return found


@pytest.mark.parametrize("how", ADDED)
def test_it_is_as_if_the_block_had_written_zeros(how: str) -> None:
    model = block(ADDED[how])
    expected, other = run(model, 0.0), run(model, 1.0)
    assert np.abs(expected - other).max() > 0.1
    leave_out(model, 3, output_of(model))
    np.testing.assert_allclose(run(model, 1.0), expected, rtol=1e-6, atol=1e-6)
    assert not any(v is not None and v.name == "y" for node in model.graph for v in node.inputs)


@pytest.mark.parametrize("how", REFUSED)
def test_what_would_not_be_zeros_is_refused(how: str) -> None:
    nodes, reader = REFUSED[how]
    model = block(nodes)
    with pytest.raises(InputError, match=rf"layer 3 cannot be dropped: .* but read by {reader}"):
        leave_out(model, 3, output_of(model))
