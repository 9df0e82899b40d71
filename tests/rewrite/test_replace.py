"""The rewrite: the graph computes what PyTorch computes with the same maps, and exactly K layers are gone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.errors import BuildError, InputError
from nbl_export.export.forms import STATIC
from nbl_export.export.torch import export_torch, save_in_precision
from nbl_export.graph.cache import KV_LAYERS_KEY, LAYERS_KEY, kv_layers, metadata_list
from nbl_export.graph.facts import facts_of
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.graph.regions import find_regions
from nbl_export.graph.summary import DescribedLayer
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite import replace as rewrite_module
from nbl_export.rewrite.leave_out import leave_out
from nbl_export.rewrite.prove import PROOF_TOLERANCE
from nbl_export.rewrite.replace import (
    count,
    drop_layers,
    linearized_layers,
    proven_regions,
    rewrite_file,
    rewrite_summary,
)
from nbl_export.runtime.ort import OrtModel, ort_stream
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.settings.choices import FitInput
from nbl_export.verify.parity.figures import gates_for
from tests.families import Calibrated, calibrated
from tests.finished import baseline, prompts
from tests.fixtures_graph import (
    compare_streams,
    cpu_session,
    decode,
    empty_past,
    intermediate_tensors,
    low_rank,
    maps_in_place,
    pad_left,
    plan_by_hand,
    ragged_rows,
)
from tests.processes import Notes

LAYERS, WIDTH, KV_WIDTH = 5, 64, 32  # stories260K


def assert_clean(path: Path, kept: Sequence[int], layers: int) -> None:
    """Interface, metadata and liveness of a rewritten graph, read with onnx alone."""
    proto = onnx.load(str(path), load_external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
    pairs = [f"{n}.{side}" for n in range(len(kept)) for side in ("key", "value")]
    inputs = [i.name for i in proto.graph.input]
    assert [i for i in inputs if i.startswith("past")] == [f"past_key_values.{p}" for p in pairs]
    assert [o.name for o in proto.graph.output] == ["logits", *(f"present.{p}" for p in pairs)]
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(metadata[KV_LAYERS_KEY]) == list(kept)
    described = json.loads(metadata[LAYERS_KEY])
    assert [(r["layer"], r["kind"]) for r in described] == [
        (i, "attention" if i in kept else "linear") for i in range(layers)
    ]
    written = {name for node in proto.graph.node for name in node.output}
    assert all(r["input"] in written and r["output"] in written for r in described)
    read = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    assert {t.name for t in proto.graph.initializer} <= read
    assert all(any(name in read for name in node.output) for node in proto.graph.node)


def full_recompute(model: Any, plan: Plan, row: Any) -> Any:
    """The logits of one row with the plan's maps in place of attention outputs; no cache, no padding."""
    with maps_in_place(model, plan), torch.inference_mode():
        return (
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()
        )


def assert_computes_the_plan(path: Path, model: Any, plan: Plan, rows: Sequence[Any], steps: int) -> None:
    """In a ragged prefill and in decode steps, by onnxruntime alone."""
    runner = cpu_session(path)
    past, (_, *present) = empty_past(runner, len(rows)), [o.name for o in runner.get_outputs()]
    expected = [full_recompute(model, plan, row) for row in rows]
    pairs = dict(zip(past, present, strict=True))
    for step, found in enumerate(decode(runner, rows, past, pairs, steps)):
        for logits, want in zip(found["logits"], expected, strict=True):
            own = want[len(want) - steps + step - 1 :][:1] if step else want[: len(want) - steps]
            np.testing.assert_allclose(logits[-len(own) :], own, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "fit_input"),
    [
        ((), "normed"),
        ((0,), "residual"),
        ((4,), "normed"),
        ((1, 2), "residual"),
        ((0, 1, 2, 3, 4), "normed"),
    ],
    ids=str,
)
def test_stories(
    stories_out: Path, stories_model: Any, tmp_path: Path, layers: tuple[int, ...], fit_input: FitInput
) -> None:
    plan = plan_by_hand(stories_out, layers, fit_input)
    path = tmp_path / "model.onnx"
    result = rewrite_file(baseline(stories_out), plan, path)
    rows = prompts(stories_out, (40, 27, 12))
    assert_computes_the_plan(path, stories_model, plan, rows, 3)
    kept = [i for i in range(LAYERS) if i not in layers]
    assert_clean(path, kept, LAYERS)
    assert result.files == [path, path.with_name("model.onnx.data")]
    assert result.before.kv_pairs - result.after.kv_pairs == len(layers)
    assert result.after.ops.get("Attention", 0) == len(kept)
    assert sorted(result.proofs) == list(range(LAYERS))
    assert all(p.holds(PROOF_TOLERANCE["fp32"]) for p in result.proofs.values())
    # q and o are d × d, k and v are d × kv; W is d × d, b is d and stays inside the .onnx file.
    saved = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH - WIDTH * WIDTH)
    before, after = (p.with_name("model.onnx.data").stat().st_size for p in (baseline(stories_out), path))
    assert abs(before - after - len(layers) * saved) <= 8192


# refusals ----------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A target that holds something already; a refusal must leave it."""
    (tmp_path / "model.onnx").write_bytes(b"the old graph")
    (tmp_path / "model.onnx.data").write_bytes(b"the old data")
    return tmp_path / "model.onnx"


def assert_untouched(old: Path) -> None:
    beginnings = {p.name: p.read_bytes()[:32] for p in old.parent.iterdir()}
    assert beginnings == {"model.onnx": b"the old graph", "model.onnx.data": b"the old data"}


def test_a_rewritten_graph_is_refused(stories_out: Path, old: Path) -> None:
    with pytest.raises(InputError, match="already rewritten"):
        rewrite_file(stories_out / "model.onnx", plan_by_hand(stories_out, (1,)), old)
    assert_untouched(old)


@pytest.mark.parametrize("step", ["check_like", "count"])
def test_a_graph_that_fails_the_last_checks_replaces_nothing(
    stories_out: Path, old: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise BuildError("refused at the end")

    monkeypatch.setattr(rewrite_module, step, (lambda _source: fail) if step == "check_like" else fail)
    with pytest.raises(BuildError, match="refused at the end"):
        rewrite_file(baseline(stories_out), plan_by_hand(stories_out, (1,)), old)
    assert_untouched(old)


# rank --------------------------------------------------------------------------------------------


def test_maps_of_low_rank_are_written_as_two_factors(
    stories_out: Path, stories_model: Any, tmp_path: Path
) -> None:
    plan = low_rank(plan_by_hand(stories_out, (1, 3), "residual"), 8)
    path = tmp_path / "model.onnx"
    rewrite_file(baseline(stories_out), plan, path)
    assert_computes_the_plan(path, stories_model, plan, prompts(stories_out, (40, 27, 12)), 3)
    assert_clean(path, [0, 2, 4], LAYERS)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    for layer, linear in plan.layers.items():
        assert linear.up is not None and linear.down is not None
        np.testing.assert_array_equal(arrays[f"layers.{layer}.nbl_linear.down_weight"], linear.down.T)
        np.testing.assert_array_equal(arrays[f"layers.{layer}.nbl_linear.weight"], linear.up.T)
    before, after = (p.with_name("model.onnx.data").stat().st_size for p in (baseline(stories_out), path))
    saved = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH - 2 * 8 * WIDTH)
    assert abs(before - after - 2 * saved) <= 8192


def test_count_refuses_what_was_not_planned(stories_out: Path, tmp_path: Path) -> None:
    path, plan = tmp_path / "model.onnx", plan_by_hand(stories_out, (1,))
    rewrite_file(baseline(stories_out), plan, path)
    found = proven_regions(baseline(stories_out), plan)
    count(load_graph(path), path, found, plan)
    for layers in ((), (1, 2)):
        with pytest.raises(BuildError, match="attention layers, expected"):
            count(load_graph(path), path, found, plan_by_hand(stories_out, layers))
    with pytest.raises(BuildError, match="KV pairs, expected"):
        count(load_graph(path), path, replace(found, cached=()), plan)
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer.append(onnx.helper.make_tensor("dead", onnx.TensorProto.FLOAT, [1], [0.0]))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match="1 dead initializers, expected 0"):
        count(load_graph(path), path, found, plan)


@pytest.mark.parametrize(("name", "least", "most"), [("int4", 0.05, 0.2), ("int8", 0.002, 0.02)])
def test_what_storing_w_costs_is_said_and_recorded(
    baseline_in: Callable[[str], Path],
    stories_out: Path,
    tmp_path: Path,
    name: str,
    least: float,
    most: float,
) -> None:
    plan, listener = plan_by_hand(stories_out, (1, 3)), Notes()
    result = rewrite_file(baseline_in(name), plan, tmp_path / "model.onnx", listener)
    stored = rewrite_summary(result).stored
    assert [s.layer for s in stored] == [1, 3] and all(least < s.error < most for s in stored)
    (note,) = [note for note in listener.notes if note.startswith("Storing W changes W u by")]
    worst = max(stored, key=lambda s: s.error)
    assert f"most in layer {worst.layer} ({worst.error:.1%})" in note


TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS, HALVES = ("concat", "static"), ("fp16", "bf16")
DATA = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def graphs(
    stories_out: Path, stories_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Path]:
    """stories260K by form and precision, not rewritten."""
    folder = tmp_path_factory.mktemp("half")
    found = {("concat", "fp32"): baseline(stories_out), ("static", "fp32"): folder / "model.onnx"}
    export_torch(stories_model, found["static", "fp32"], form=STATIC)
    rows = prompts(stories_out, (60, 40))
    for form in FORMS:
        for name in HALVES:
            found[form, name] = folder / f"{form}-{name}" / "model.onnx"
            graph = load_graph(found[form, "fp32"])
            save_in_precision(graph, found[form, name], PRECISIONS[name], rows if name == "fp16" else [])
    return found


def parity(path: Path, model: Any, plan: Plan, out: Path, name: str) -> Any:
    rows = prompts(out, (40, 27, 12))
    with linearized(model, plan):
        reference = PastStream(TorchDecoder(model, plan.linear_attention))
        return compare_streams(reference, ort_stream(path, 40), rows, 4, gates_for(PRECISIONS[name].gates))


@pytest.mark.parametrize(
    ("layers", "form", "name"),
    [
        ((0,), "static", "fp32"),
        ((1, 2), "concat", "fp16"),
        ((1, 2), "static", "fp16"),
        ((0,), "concat", "bf16"),
        ((0, 1, 2, 3, 4), "static", "bf16"),
    ],
    ids=str,
)
def test_parity(
    graphs: Any, stories_out: Path, stories_model: Any, tmp_path: Path, form: str, name: str, layers: Any
) -> None:
    plan = plan_by_hand(stories_out, layers)
    path = tmp_path / "model.onnx"
    result = rewrite_file(graphs[form, name], plan, path)
    assert parity(path, stories_model, plan, stories_out, name).failures() == []
    kept = [i for i in range(LAYERS) if i not in layers]
    assert_clean(path, kept, LAYERS)
    assert result.before.kv_pairs - result.after.kv_pairs == len(layers)
    assert result.after.ops.get("Attention", 0) == len(kept)
    assert result.after.ops.get("TensorScatter", 0) == 2 * len(kept) * (form == "static")


@pytest.mark.parametrize(
    ("fit_input", "name", "form"),
    [
        ("normed", "fp16", "concat"),
        ("normed", "bf16", "static"),
        ("residual", "fp16", "static"),
        ("residual", "bf16", "concat"),
    ],
)
def test_maps_are_stored_in_the_graphs_precision(
    graphs: Any, stories_out: Path, tmp_path: Path, form: str, name: str, fit_input: Any
) -> None:
    plan = plan_by_hand(stories_out, (1, 3), fit_input)
    rewrite_file(graphs[form, name], plan, tmp_path / "model.onnx")
    proto = onnx.load(str(tmp_path / "model.onnx"))
    tensors = {t.name: t for t in proto.graph.initializer}
    for layer, linear in plan.layers.items():
        for kind, exact in (("weight", linear.w.T), ("bias", linear.b)):
            tensor = tensors[f"layers.{layer}.nbl_linear.{kind}"]
            assert tensor.data_type == DATA[name]
            rounded = torch.from_numpy(exact.copy()).to(TORCH[name]).float().numpy()
            assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.float32), rounded)
    # Nothing is cast on the way into a map, nor out of it.
    around = {n.op_type for n in proto.graph.node if "nbl_linear" in n.name}
    assert around == {"MatMul", "Add"}
    before = onnx.load(str(graphs[form, name]), load_external_data=False)
    casts = [Counter(n.op_type for n in p.graph.node)["Cast"] for p in (before, proto)]
    assert casts[0] == casts[1]


# A map that float16 cannot hold ------------------------------------------------------------------


def beyond_float16(plan: Plan, layer: int) -> Plan:
    """The plan with one entry of W at 70,000, where it meets the smallest of its inputs."""
    u = np.abs(plan.probe_u[layer]).max(axis=0)
    w = plan.layers[layer].w.copy()
    w[5, int(u.argmin())] = 70_000
    return replace(plan, layers={**plan.layers, layer: LinearLayer(w, plan.layers[layer].b)})


def computed(path: Path, plan: Plan, layer: int) -> tuple[dict[str, int], str, Any, Any]:
    """The types of all maps' numbers; of one layer the operator that writes its output, that, and W u + b of its u."""
    proto = onnx.load(str(path))
    types = {t.name: t.data_type for t in proto.graph.initializer if "nbl_linear" in t.name}
    described = json.loads(next(p.value for p in proto.metadata_props if p.key == "nbl_export.layers"))[layer]
    writer = next(n for n in proto.graph.node if described["output"] in n.output)
    tensors = intermediate_tensors(path, [described["input"], described["output"]], plan.probe)
    u, y = (v[plan.probe["attention_mask"].astype(bool)].astype(np.float64) for v in tensors.values())
    return types, writer.op_type, y, (u, u @ plan.layers[layer].w.T.astype(np.float64) + plan.layers[layer].b)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("name", "form"), zip(HALVES, FORMS, strict=True))
def test_a_map_beyond_float16_is_computed_in_float32(
    graphs: Any, stories_out: Path, tmp_path: Path, form: str, name: str
) -> None:
    plan = beyond_float16(plan_by_hand(stories_out, (0, 3), "residual"), 0)
    rewrite_file(graphs[form, name], plan, tmp_path / "model.onnx")
    types, writer, y, (u, expected) = computed(tmp_path / "model.onnx", plan, 0)
    full = onnx.TensorProto.FLOAT if name == "fp16" else DATA[name]
    assert types == {
        "layers.0.nbl_linear.weight": full,
        "layers.0.nbl_linear.bias": full,
        "layers.3.nbl_linear.weight": DATA[name],
        "layers.3.nbl_linear.bias": DATA[name],
    }
    assert writer == ("Cast" if name == "fp16" else "Add")
    assert np.abs(expected).max() < 65_504
    scale = np.abs(u) @ np.abs(plan.layers[0].w.T) + np.abs(plan.layers[0].b)
    assert (np.abs(y - expected) <= {"fp16": 2.0**-10, "bf16": 2.0**-6}[name] * scale).all()


# A residual stream that float16 cannot hold --------------------------------------------------------


def test_a_map_whose_result_is_kept_in_float32_is_computed_in_float32(
    stories_out: Path, tmp_path: Path
) -> None:
    """Where attention writes more than float16 holds, so does the map that stands for it."""
    model = load_graph(baseline(stories_out))
    regions = {r.layer: r for r in find_regions(model)}
    to_precision(model, PRECISIONS["fp16"], {str(regions[1].outputs[0].value.name): 1e5})
    source = tmp_path / "wide" / "model.onnx"
    save_graph(model, source)
    plan = plan_by_hand(stories_out, (1,))
    # Every entry fits into float16, their sum does not.
    plan.layers[1].w[5] = 30_000 * np.sign(plan.probe_u[1][0])
    rewrite_file(source, plan, tmp_path / "model.onnx")
    types, writer, y, (_, expected) = computed(tmp_path / "model.onnx", plan, 1)
    assert set(types.values()) == {onnx.TensorProto.FLOAT} and len(types) == 2 and writer == "Add"
    assert np.abs(expected).max() > 65_504
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1)


# Proof -------------------------------------------------------------------------------------------


SPANS: list[tuple[Block, ...]] = [
    (Span(1, 2), 4),
    (Span(0, 0), Mlp(2), Span(3, 4)),
    (Span(0, 3), Span(4, 4)),
]


@pytest.fixture(scope="module")
def case(stories_folder: Path) -> Calibrated:
    return calibrated(stories_folder)


@pytest.mark.parametrize("blocks", SPANS, ids=str)
def test_spans_of_a_real_model(
    case: Calibrated, stories_out: Path, tmp_path: Path, blocks: tuple[Block, ...]
) -> None:
    plan, path = case.plan(blocks), tmp_path / "model.onnx"
    assert plan.blocks == tuple(sorted(blocks))
    result = rewrite_file(baseline(stories_out), plan, path)
    rows = prompts(stories_out, (40, 27, 12))
    assert_computes_the_plan(path, case.model, plan, rows, 3)

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


@pytest.mark.parametrize("layers", [(1, 4), (0, 1, 2, 3, 4)], ids=str)
def test_what_is_left_is_the_model_without_those_layers(
    stories_out: Path, stories_model: Any, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    path = tmp_path / "linear.onnx"
    plan = plan_by_hand(stories_out, layers)
    nothing = LinearLayer(np.zeros((WIDTH, WIDTH), np.float32), np.zeros(WIDTH, np.float32))
    zeros = replace(plan, layers=dict.fromkeys(layers, nothing))
    rewrite_file(baseline(stories_out), plan, path)
    graph = load_graph(path)
    before = len(list(graph.graph))
    drop_layers(graph)
    # A norm, the map's product and sum, and the residual addition.
    assert len(list(graph.graph)) == before - 4 * len(layers)
    save_graph(graph, tmp_path / "dropped.onnx")
    decoder = OrtModel(tmp_path / "dropped.onnx")
    rows = ragged_rows((9, 4), 500, seed=7)
    logits = decoder(*pad_left(rows), decoder.empty_past(2)).logits
    for i, row in enumerate(rows):
        expected = full_recompute(stories_model, zeros, row)
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


MIXED: tuple[Block, ...] = (0, Mlp(0), Mlp(2), 3)


@pytest.fixture(scope="module")
def tiny_case(tiny_folder: Path) -> Calibrated:
    return calibrated(tiny_folder)


@pytest.fixture(scope="module")
def mixed_plan(tiny_case: Calibrated) -> Plan:
    return tiny_case.plan(MIXED)


def failures(model: Any, plan: Plan, graph: Path) -> Sequence[str]:
    rows = ragged_rows((9, 5, 7), model.config.vocab_size)
    with linearized(model, plan):
        reference = PastStream(TorchDecoder(model, plan.linear_attention))
        return compare_streams(reference, ort_stream(graph, 16), rows, 2, gates_for("float32")).failures()


def test_attentions_and_mlps_become_linear_and_nothing_else_changes(
    tiny_graph: Path, tiny_case: Calibrated, mixed_plan: Plan, tmp_path: Path
) -> None:
    target = tmp_path / "model.onnx"
    result = rewrite_file(tiny_graph, mixed_plan, target)
    graph = load_graph(target)
    assert linearized_layers(graph) == MIXED
    assert kv_layers(graph) == mixed_plan.attention_layers == (1, 2), "an MLP has no keys and values"
    assert result.before.kv_pairs - result.after.kv_pairs == 2
    assert failures(tiny_case.model, mixed_plan, target) == []
    # Weights of both, W and b in their place; norms stay.
    d, inner = tiny_case.model.config.hidden_size, tiny_case.model.config.intermediate_size
    attention = sum(p.numel() for p in tiny_case.model.model.layers[0].self_attn.parameters())
    gone = 2 * attention + 2 * 3 * d * inner - 4 * (d * d + d)
    assert result.before.parameters - result.after.parameters == gone
    left = [name for name in graph.graph.initializers if "layers.0.mlp." in name and "nbl_linear" not in name]
    assert left == []


def swapped(plan: Plan, name: str, a: Block, b: Block) -> Plan:
    values = dict(getattr(plan, name))
    values[a], values[b] = values[b], values[a]
    return replace(plan, **{name: values})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan: swapped(
            swapped(plan, "probe_u", Mlp(0), Mlp(1)), "probe_y", Mlp(0), Mlp(1)
        ),  # its neighbour's
        lambda plan: swapped(plan, "probe_y", Mlp(0), 0),  # the attention's output
        lambda plan: replace(plan, probe_y={**plan.probe_y, Mlp(0): plan.probe_y[Mlp(0)] * 1.01}),
        lambda plan: replace(plan, probe_u={**plan.probe_u, Mlp(0): plan.probe_u[Mlp(0)] * 1.01}),
    ],
)
def test_an_mlp_that_is_not_proven_is_not_replaced(
    tiny_graph: Path, mixed_plan: Plan, tmp_path: Path, wrong: Any
) -> None:
    with pytest.raises(BuildError, match="not proven"):
        rewrite_file(tiny_graph, wrong(mixed_plan), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
