"""A model some of whose layers are no attention, the whole way: what is no candidate stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from nbl_export import api
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.probe import probe_model
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch, save_in_precision
from nbl_export.graph.cache import kv_layers
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.linearize.swap import linearized
from nbl_export.models.layers import attention_layers
from nbl_export.rewrite.replace import linearized_layers, rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings.choices import OLDEST_OPSET
from tests.clients.test_generating import greedy
from tests.conftest import exhaustive
from tests.end_to_end.test_matrix import CHOSEN, ROWS, parity, rewritten
from tests.exporters import FLAT, GRAPH, NUMBERED, Names, torchscript
from tests.families import DECODERS, Calibrated, build, unsaved
from tests.test_families import HYBRIDS
from tests.tiny import save_tokenizer
from tests.tiny_types import tiny_model

TEXT = api.CalibrateSettings(samples=8, seq_len=64, heldout_samples=2)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions in layers 0 and 2, attention in 1 and 3."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    tiny_model("lfm2").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_without_a_cache_attention_is_linearized_and_convolutions_stay(hybrid: Path, tmp_path: Path) -> None:
    report = api.run(
        hybrid,
        tmp_path / "out",
        api.SelectSettings(k=1),
        TEXT,
        api.VerifySettings(decode_steps=3, contexts=(16,), rounds=3),
        exporting=api.ExportSettings(kv_cache="none"),
    )
    assert report.passed and {c.name: c.status for c in report.checks}["parity"] == "passed"
    assert {c.layer for c in report.selection.candidates} == {1, 3}
    assert report.selection.others == {"0": "conv", "2": "conv"}
    assert set(report.selection.layers) < {1, 3}
    before, after = report.graph.before, report.graph.after
    assert (before.kv_pairs, after.kv_pairs) == (0, 0)
    assert before.ops["Attention"] - after.ops["Attention"] == 1
    assert before.ops["Conv"] == after.ops["Conv"] == 2
    # A token without a cache costs what its text costs: only whole texts are timed.
    assert report.speed is not None and {c.phase for c in report.speed.cells} == {"prefill"}
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "| 0 | conv | no candidate |" in text


def test_with_a_cache_it_decodes(hybrid: Path, tmp_path: Path) -> None:
    """All attention linear: no KV cache is left, the states stay, and the report still compares and times decoding."""
    report = api.run(
        hybrid,
        tmp_path / "out",
        api.SelectSettings(layers=(1, 3)),
        TEXT,
        api.VerifySettings(decode_steps=3, contexts=(16,), rounds=3),
    )
    assert report.passed and {c.name: c.status for c in report.checks}["parity"] == "passed"
    assert (report.graph.before.kv_pairs, report.graph.after.kv_pairs) == (2, 0)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [i.name for i in session.get_inputs() if "past" in i.name] == ["past.0.conv", "past.1.conv"]
    assert report.speed is not None and {c.phase for c in report.speed.cells} == {"prefill", "decode"}


@pytest.mark.parametrize(
    "family", [f if f == "bamba" else pytest.param(f, marks=exhaustive) for f in HYBRIDS]
)
def test_a_graph_goes_on_through_chunks_and_beyond(family: str, tmp_path: Path) -> None:
    """300 tokens after a prompt of 90, in chunks of 100: what one pass of PyTorch over all of them says, each time."""
    chunk = {"mamba_chunk_size": 100, "chunk_size": 100, "block_size": 100}
    model = unsaved(family, max_position_embeddings=512, **chunk).eval()
    export_torch(model, tmp_path / "model.onnx")
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, 250, 90)]
    tokens = greedy(tmp_path / "model.onnx", prompt, 300)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(dim=-1).tolist() == tokens
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("settings", [{"kv_cache": "static"}, {"exporter": "genai"}])
def test_where_states_have_no_inputs_it_is_refused_before_any_work(
    hybrid: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(
        api.NblError, match=r"2 layers of Lfm2ForCausalLM .* \(layer 0: conv\).*torch with --kv-cache concat"
    ):
        exporting = api.ExportSettings(**settings)
        api.run(hybrid, tmp_path / "out", api.SelectSettings(k=1), TEXT, exporting=exporting)
    assert not (tmp_path / "out" / "nbl" / "moments").exists()


SHARED_TEXT = api.CalibrateSettings(samples=16, seq_len=64, heldout_samples=2)
CHECKS = api.VerifySettings(decode_steps=3, contexts=(16,), rounds=3, speed=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of which layers 2 and 3 attend to the keys and values of layers 0 and 1."""
    root = tmp_path_factory.mktemp("shared")

    @cache
    def made(kind: str) -> Path:
        tiny_model(kind).save_pretrained(root / kind)
        save_tokenizer(root / kind)
        return root / kind

    return made


@pytest.mark.parametrize(
    ("kind", "form"), [("gemma3n_text", "concat"), pytest.param("gemma4_text", "static", marks=exhaustive)]
)
def test_a_layer_that_borrows_is_linearized_alone(
    kind: str, form: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    report = api.run(
        folders(kind),
        tmp_path / "out",
        api.SelectSettings(k=1),
        SHARED_TEXT,
        CHECKS,
        exporting=api.ExportSettings(kv_cache=form),
    )
    assert report.passed
    assert {c.layer for c in report.selection.candidates} == {2, 3}
    assert report.selection.others["1"] == "full: its keys and values are read by layer 3"
    before, after = report.graph.before, report.graph.after
    # The cache is the lenders', and they stay.
    assert before.kv_pairs == after.kv_pairs == 2
    assert before.ops["Attention"] - after.ops["Attention"] == 1
    assert kv_layers(load_graph(tmp_path / "out" / "model.onnx")) == (0, 1)
    assert "1 attention layer and 0 KV pairs gone" in report.checks[0].detail
    table = api.inspect(tmp_path / "out" / "baseline" / "model.onnx")[-1]
    rows = {row[0]: row[-1] for row in table.rows}
    assert rows["0"] == "no: no other layer reads its keys and values (found: read by 2)"
    assert rows["2"] == rows["3"] == "yes"


def test_all_that_borrow_are_linear_and_repaired(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """By losses that start at a later block, and by training that goes through both kinds of layers."""
    selection = api.SelectSettings(k=2, criterion="kl", repair=2, fit_input="residual")
    report = api.run(folders("gemma4_text"), tmp_path / "out", selection, SHARED_TEXT, CHECKS)
    assert report.passed and set(report.selection.layers) == {2, 3}


def test_a_layer_that_lends_is_refused_before_any_work(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        api.NblError, match=r"--layers names layer 1, .* \(full: its keys and values are read by layer 3\)"
    ):
        api.run(folders("gemma4_text"), tmp_path / "out", api.SelectSettings(layers=(1, 3)), SHARED_TEXT)
    with pytest.raises(api.NblError, match=r"--k is 3; it must be between 0 and 2"):
        api.run(folders("gemma4_text"), tmp_path / "out", api.SelectSettings(k=3), SHARED_TEXT)
    assert not (tmp_path / "out" / "nbl" / "moments").exists()


STEPS = 3


# A block with experts and one without.
TWO_LAYERS = {"num_hidden_layers": 2, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        # Two stages of projections, a cache of what lies between them, complex rotary embeddings.
        pytest.param("deepseek_v2", "concat", marks=exhaustive),
        ("deepseek_v3", "static"),
        # Convolutions in between: the second region of the graph is the fourth layer of the model.
        ("lfm2", "none"),
        pytest.param("mixtral", "concat", marks=exhaustive),
    ],
)
def test_from_calibration_to_logits(model_type: str, form: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, **(TWO_LAYERS if "deepseek" in model_type else {}))
    tokens = np.random.default_rng(0).integers(3, 260, (32, 24), dtype=np.int32)
    calibrated = Calibrated(model, collect_moments(model, tokens), probe_model(model, tokens))
    plan = calibrated.plan([attention_layers(model)[1].index])
    export_torch(model, tmp_path / "base" / "model.onnx", form=FORMS[form])
    rewrite_file(tmp_path / "base" / "model.onnx", plan, tmp_path / "model.onnx")
    assert linearized_layers(load_graph(tmp_path / "model.onnx")) == plan.chosen
    rows = [tokens[0][:11], tokens[1][:6]]
    stream = ort_stream(tmp_path / "model.onnx", 16)

    def logits(stream: object) -> np.ndarray:  # type: ignore[type-arg]
        steps = [stream.prefill(rows)]  # type: ignore[attr-defined]
        steps += [stream.decode([int(t[12 + i]) for t in tokens[:2]]) for i in range(STEPS)]  # type: ignore[attr-defined]
        return np.concatenate(steps)

    with linearized(model, plan):
        expected = logits(torch_stream(model, plan.chosen, form != "none"))
    original = logits(torch_stream(model, (), form != "none"))
    found = logits(stream)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)
    assert np.abs(original - expected).max() > 0.02  # the layer is missed


# What differs in the operators that the exporter decomposes: rotary embeddings, windows, experts, LayerNorms, sinks,
# branches, scans.
USUAL = ("gemma2", "phi3", "gpt2")
NEWER = {"Attention", "RMSNormalization", "RotaryEmbedding", "Gelu", "TensorScatter", "Swish"}


def of_opset(graph: Path, opset: int) -> None:
    """``graph`` says that it is of this opset, and every operator in it is."""
    model = onnx.load(str(graph), load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    assert model.ir_version == 8  # what the first readers of opset 18 knew
    operators = {node.op_type for node in model.graph.node}
    assert not operators & NEWER and {"MatMul", "Softmax"} <= operators
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("family", [f if f in USUAL else pytest.param(f, marks=exhaustive) for f in DECODERS])
def test_every_family_is_rewritten_and_right(
    family: str, calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """Ragged prefill and decode with half the layers linear, in float32 and in float16."""
    case, plan = calibrated_of(family), calibrated_of(family).plan(CHOSEN["half"])
    source = tmp_path / GRAPH
    export_torch(case.model, source, form=replace(FORMS["concat"], opset=OLDEST_OPSET))
    of_opset(source, OLDEST_OPSET)
    half = tmp_path / "fp16" / GRAPH
    half.parent.mkdir()
    save_in_precision(load_graph(source), half, precision_of("fp16"), ROWS)
    for graph, precision in ((source, "fp32"), (half, "fp16")):
        rewritten = tmp_path / f"linear-{precision}" / GRAPH
        rewrite_file(graph, plan, rewritten)
        of_opset(rewritten, OLDEST_OPSET)
        found = parity(case.model, plan, rewritten, precision_of(precision).gates)
        assert found.failures() == []


OWN = ("tokens", "visible", "where")
ABSENT = Names(FLAT.past, lambda layer, side: f"out.{side}.{layer}")


@pytest.mark.parametrize(
    ("family", "tokens", "names"),
    [
        ("llama-gqa", OWN, NUMBERED),
        pytest.param("gpt2", OWN, ABSENT, marks=exhaustive),  # positions choose rows of a table
    ],
)
def test_every_layer(
    family: str,
    tokens: Sequence[str],
    names: Names,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    torchscript(names, tokens)(build(family, tmp_path / "model"), folder)
    case = calibrated_of(family)
    for k, chosen in CHOSEN.items():
        plan = case.plan(chosen)
        out, result = rewritten(folder, plan, tmp_path / k)
        assert result.before.kv_pairs - result.after.kv_pairs == len(plan.linear_attention)
        assert parity(case.model, plan, out / GRAPH).failures() == []
        graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
        assert [i.name for i in graph.input][:3] == list(tokens)
