"""The rewrite of half-precision graphs, with a growing and with a static cache."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.export.forms import STATIC
from nbl_export.export.ranges import save_in_precision
from nbl_export.export.torch import export_torch
from nbl_export.graph.cache import KV_LAYERS_KEY
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.graph.regions import find_regions
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.intermediates import intermediate_tensors
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import gates_for
from tests.fixtures_graph import maps_in_place, plan_by_hand
from tests.rewrite.by_hand import assert_clean, baseline, prompts

LAYERS, WIDTH = 5, 64  # stories260K
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
        reference = PastStream(TorchDecoder(model, plan.chosen))
        return compare_streams(reference, ort_stream(path, 40), rows, 4, gates_for(PRECISIONS[name].gates))


def recomputed(model: Any, plan: Plan, row: Any) -> Any:
    """Logits of one row in float32 with the maps in place: no cache, no padding, no stream."""
    with maps_in_place(model, plan), torch.inference_mode():
        return (
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()
        )


# The growing float32 cache is in test_replace.
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
    # The same against a plain pass over each row: no stream of ours on that side.
    tolerance = {"fp32": 1e-3, "fp16": 0.1, "bf16": 1.0}[name]
    rows = prompts(stories_out, (30, 11))
    stream = ort_stream(path, 30)
    found = np.split(stream.prefill([r[:-1] for r in rows]), [29])
    last = stream.decode([int(r[-1]) for r in rows])
    for number, row in enumerate(rows):
        expected = recomputed(stories_model, plan, row)
        logits = np.r_[found[number], last[number : number + 1]]
        assert np.abs(logits - expected).max() < tolerance
    kept = [i for i in range(LAYERS) if i not in layers]
    assert_clean(path, kept, LAYERS)
    assert result.before.kv_pairs - result.after.kv_pairs == len(layers)
    assert result.after.ops.get("Attention", 0) == len(kept)
    assert result.after.ops.get("TensorScatter", 0) == 2 * len(kept) * (form == "static")
    assert list(path.parent.iterdir()) and not list(path.parent.glob(".*"))


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
    values = (*proto.graph.input, *proto.graph.output)
    dtypes = {v.name: v.type.tensor_type.elem_type for v in values if "." in v.name}
    assert set(dtypes.values()) == {DATA[name]} and len(dtypes) == 4 * (LAYERS - 2)
    assert json.loads(next(p.value for p in proto.metadata_props if p.key == KV_LAYERS_KEY)) == [0, 2, 4]


# A map that float16 cannot hold ------------------------------------------------------------------


def beyond_float16(plan: Plan, layer: int) -> Plan:
    """The plan with one entry of W at 70,000, where it meets the smallest of its inputs."""
    u = np.abs(plan.probe_u[layer]).max(axis=0)
    w = plan.layers[layer].w.copy()
    w[5, int(u.argmin())] = 70_000
    return replace(plan, layers={**plan.layers, layer: LinearLayer(w, plan.layers[layer].b)})


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("name", "form"), zip(HALVES, FORMS, strict=True))
def test_a_map_beyond_float16_is_computed_in_float32(
    graphs: Any, stories_out: Path, stories_model: Any, tmp_path: Path, form: str, name: str
) -> None:
    plan = beyond_float16(plan_by_hand(stories_out, (0, 3), "residual"), 0)
    path = tmp_path / "model.onnx"
    rewrite_file(graphs[form, name], plan, path)
    proto = onnx.load(str(path))
    types = {t.name: t.data_type for t in proto.graph.initializer if "nbl_linear" in t.name}
    full = onnx.TensorProto.FLOAT if name == "fp16" else DATA[name]
    assert types == {
        "layers.0.nbl_linear.weight": full,
        "layers.0.nbl_linear.bias": full,
        "layers.3.nbl_linear.weight": DATA[name],
        "layers.3.nbl_linear.bias": DATA[name],
    }
    described = json.loads(next(p.value for p in proto.metadata_props if p.key == "nbl_export.layers"))[0]
    writer = {n.output[0]: n for n in proto.graph.node}[described["output"]]
    assert writer.op_type == ("Cast" if name == "fp16" else "Add")
    # Its numbers: W u + b in float64 of the u that the graph has.
    found = intermediate_tensors(path, [described["input"], described["output"], "logits"], plan.probe)
    u, y, _ = (v.astype(np.float64) for v in found.values())
    linear = plan.layers[0]
    real = plan.probe["attention_mask"].astype(bool)
    expected = (u @ linear.w.T.astype(np.float64) + linear.b)[real]
    assert np.abs(expected).max() < 65_504
    scale = np.abs(u)[real] @ np.abs(linear.w.T) + np.abs(linear.b)
    assert (np.abs(y[real] - expected) <= {"fp16": 2.0**-10, "bf16": 2.0**-6}[name] * scale).all()
    assert parity(path, stories_model, plan, stories_out, name).failures() == []


# A residual stream that float16 cannot hold --------------------------------------------------------


def test_a_map_whose_result_is_kept_in_float32_is_computed_in_float32(
    stories_out: Path, tmp_path: Path
) -> None:
    """Where attention writes more than float16 holds, so does the map that stands for it."""
    model = load_graph(baseline(stories_out))
    regions = {r.layer: r for r in find_regions(model)}
    to_precision(model, PRECISIONS["fp16"], {str(regions[1].y.name): 1e5})
    source = tmp_path / "wide" / "model.onnx"
    save_graph(model, source)
    plan = plan_by_hand(stories_out, (1,))
    # Every entry fits into float16, their sum does not.
    linear = LinearLayer(plan.layers[1].w.copy(), plan.layers[1].b.copy())
    linear.w[5] = 30_000 * np.sign(plan.probe_u[1][0])
    rewrite_file(source, replace(plan, layers={1: linear}), tmp_path / "model.onnx")
    proto = onnx.load(str(tmp_path / "model.onnx"))
    types = {t.name: t.data_type for t in proto.graph.initializer if "nbl_linear" in t.name}
    assert set(types.values()) == {onnx.TensorProto.FLOAT} and len(types) == 2
    writers = {n.output[0]: n for n in proto.graph.node}
    described = json.loads(next(p.value for p in proto.metadata_props if p.key == "nbl_export.layers"))[1]
    assert writers[described["output"]].op_type == "Add"
    u, y = intermediate_tensors(
        tmp_path / "model.onnx", [described["input"], described["output"]], plan.probe
    ).values()
    real = plan.probe["attention_mask"].astype(bool)
    expected = u[real].astype(np.float64) @ linear.w.T + linear.b
    assert np.abs(expected).max() > 65_504
    np.testing.assert_allclose(y[real], expected, rtol=1e-3, atol=1)


# Proof -------------------------------------------------------------------------------------------
