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

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.errors import InputError
from nbl_export.graph.cache import KV_LAYERS_KEY, LAYERS_KEY, metadata_list
from nbl_export.graph.facts import facts_of
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.summary import DescribedLayer
from nbl_export.linearize.plan import DROPPED
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite.leave_out import leave_out
from nbl_export.rewrite.replace import replaced_layers, rewrite_file
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import gates_for
from nbl_export.verify.parity.unmodified import against_unmodified
from tests.families import Calibrated, calibrated
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
    assert replaced_layers(graph) == plan.chosen
    assert facts_of(path).linear == tuple(sorted(blocks))
    described = metadata_list(graph, LAYERS_KEY, DescribedLayer)
    assert {r.layer for r in described if r.kind == "dropped"} == set(plan.dropped)
    assert all((r.input, r.output) == ("", "") for r in described if r.kind == "dropped")
    # A norm goes with all that is dropped, and the sum that it was added in.
    gone = Counter(result.before.ops)
    gone.subtract(result.after.ops)
    assert gone["RMSNormalization"] == len(plan.dropped)
    assert result.after.ops["MatMul"] == 1 + len(plan.layers) + 4 * len(kept) + 3 * (
        LAYERS - sum(isinstance(part, Mlp) for part in plan.chosen)
    )


def test_everything_dropped_leaves_the_embedding_and_the_head(
    case: Calibrated, stories_out: Path, tmp_path: Path
) -> None:
    plan = case.plan(()).with_replaced({Span(0, 3): DROPPED, Span(4, 4): DROPPED})
    assert plan.layers == {} and len(plan.dropped) == 2 * LAYERS
    result = rewrite_file(baseline(stories_out), plan, tmp_path / "model.onnx")
    assert result.after.ops["MatMul"] == result.after.ops["RMSNormalization"] == 1
    assert_computes_the_plan(tmp_path / "model.onnx", case.model, plan, prompts(stories_out, (20,)), 0)


# wrong things ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spanned(
    case: Calibrated, stories_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    plan, path = case.plan((Span(1, 2),)), tmp_path_factory.mktemp("spanned") / "model.onnx"
    rewrite_file(baseline(stories_out), plan, path)
    return plan, path


def sums(graph: ir.Model) -> list[ir.Node]:
    return [node for node in graph.graph if node.op_type == "Add"]


def test_the_graph_is_what_the_unmodified_one_with_zeros_computes(
    spanned: tuple[Any, Path], stories_out: Path
) -> None:
    plan, path = spanned

    def compare(reference: Path) -> list[str]:
        return _differ(reference, path)

    assert against_unmodified(baseline(stories_out), path, plan, compare) == []


@pytest.mark.parametrize("fault", ["a sum is gone", "a layer too few is gone", "W goes to the wrong sum"])
def test_another_graph_is_refused(
    spanned: tuple[Any, Path], case: Calibrated, stories_out: Path, tmp_path: Path, fault: str
) -> None:
    plan, path = spanned
    wrong = tmp_path / "wrong.onnx"
    if fault == "a layer too few is gone":
        rewrite_file(baseline(stories_out), case.plan((Span(1, 1),)), wrong)
        wrong_plan = plan
    else:
        graph = load_graph(path)
        linear = next(v for v in sums(graph) if "layers.1.nbl_linear" in str(v.name))
        (use,) = linear.outputs[0].uses()
        residual = next(v for v in use.node.inputs if v is not linear.outputs[0])
        assert residual is not None
        if fault == "a sum is gone":  # the layer before it, as if the wrong summand had been taken
            producer = residual.producer()
            assert producer is not None and producer.op_type == "Add" and producer.inputs[0] is not None
            residual.replace_all_uses_with(producer.inputs[0])
        else:
            later = use.node.outputs[0]
            after = next(u.node for u in later.uses() if u.node.op_type == "Add")
            at = after.inputs.index(later)
            after.replace_input_with(at, residual)
        save_graph(graph, wrong)
        wrong_plan = plan
    found = against_unmodified(baseline(stories_out), wrong, wrong_plan, lambda ref: _differ(ref, wrong))
    assert found and any(
        "not what the rewrite makes" in one or "against the unmodified" in one for one in found
    )


def _differ(reference: Path, path: Path) -> list[str]:
    tokens = np.arange(3, 12)[None]
    found = []
    for one in (reference, path):
        decoder = OrtDecoder(one)
        mask = np.ones_like(tokens)
        found.append(decoder(tokens, mask, np.arange(9)[None], decoder.empty_past(1)).logits)
    return [] if np.abs(found[0] - found[1]).max() < 1e-3 else ["the logits differ"]


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


def test_a_bias_that_is_a_part_of_it_goes_with_it() -> None:
    model = block(REFUSED["a bias of a norm of sums"][0])
    later = model.graph.initializers["beta"]
    plain = block(ADDED["a sum and a norm in one"])
    leave_out(model, 3, output_of(model), later)
    leave_out(plain, 3, output_of(plain))
    np.testing.assert_array_equal(run(model, 1.0), run(plain, 1.0))


def test_an_output_of_the_graph_is_no_summand() -> None:
    model = block("o = Identity(y)")
    model.graph.outputs[0] = output_of(model)
    with pytest.raises(InputError, match="read by the graph, as an output"):
        leave_out(model, Mlp(2), output_of(model))


def test_before_onnx_had_the_norm_it_is_onnxruntime_s() -> None:
    model = block(ADDED["a sum and a norm in one"])
    model.graph.opset_imports[""] = 21
    leave_out(model, 3, output_of(model))
    assert [node.op_type for node in model.graph] == ["SimplifiedLayerNormalization", "Mul"]
