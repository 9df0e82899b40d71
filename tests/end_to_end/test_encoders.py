"""Encoders end to end: text and images in, an ONNX graph with K linear layers out, masks and pooling kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from nbl_export import api
from nbl_export.batch import MASK, TOKENS, batch_of_rows
from nbl_export.blocks import Mlp
from nbl_export.calibrate.documents import load_images
from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.candidates import check_supported
from nbl_export.models.folder import task_named
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.report.schema import Report
from nbl_export.runtime.ort import OrtModel
from nbl_export.verify.parity.figures import EncoderParity
from nbl_export.workspace import Workspace
from tests.conftest import exhaustive
from tests.fixtures_graph import run_graph
from tests.processes import edit
from tests.tiny import (
    CLS,
    IMAGE_TOKENS,
    PAD,
    SEP,
    VOCAB,
    WIDTH,
    as_sentence_transformer,
    build_encoder,
    save_framing,
    text_encoder,
    vision_encoder,
    write_images,
    write_text,
)

pytest.importorskip("PIL", reason="needs pillow")

CHECKS = api.VerifySettings(contexts=(16,), rounds=3)
CHOSEN = (1, Mlp(0), Mlp(1), Mlp(3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert (a sentence-transformers folder) and vit, with text.jsonl and images to calibrate them on."""
    folder = tmp_path_factory.mktemp("encoders")
    as_sentence_transformer(text_encoder(folder / "bert"))
    vision_encoder(folder / "vit")
    write_text(folder / "text.jsonl")
    write_images(folder / "images")
    return folder


def calibration(place: Path, name: str) -> api.CalibrateSettings:
    source = place / ("images" if name.startswith("vit") else "text.jsonl")
    return api.CalibrateSettings(
        (str(source),), samples=24, seq_len=48, heldout_samples=4, calibration_dtype="float32"
    )


def run(place: Path, name: str, out: Path, precision: str = "fp32") -> Report:
    text = replace(calibration(place, name), blocks="both")
    chosen, exporting = api.SelectSettings(layers=CHOSEN), api.ExportSettings(precision)
    return api.run(place / name, out, chosen, text, replace(CHECKS, speed=False), exporting=exporting)


@pytest.fixture(scope="module")
def outs(place: Path) -> dict[str, Path]:
    """A finished run of each with an attention and three MLPs linear; copy it before changing it."""
    found = {}
    for name in ("bert", "vit"):
        report = run(place, name, place / "out" / name)
        assert report.passed, report.checks
        found[name] = place / "out" / name
    return found


def ragged(place: Path) -> dict[str, np.ndarray]:
    """Three texts of different lengths as the tokenizer pads them."""
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    texts = ["a short one", "one that is a good deal longer than that", "x"]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    return {name: array.astype(np.int64) for name, array in batch.items()}


def by_hand(folder: Path, inputs: dict[str, np.ndarray], plan: Any, keep: float = 1.0) -> Any:
    """transformers' own model, the plan's attentions and MLPs written over with ``keep`` · (W u + b)."""
    model = AutoModel.from_pretrained(folder).eval()
    blocks = model.layers if hasattr(model, "layers") else model.encoder.layer
    for index, layer in plan.layers.items() if plan else ():
        w, b = (torch.from_numpy(a) * keep for a in (layer.w, layer.b))

        def replaced(_m: Any, args: Any, kwargs: Any, _out: Any, w: Any = w, b: Any = b) -> Any:
            u = args[0] if args else kwargs["hidden_states"]
            y = torch.nn.functional.linear(u, w, b)
            return y if isinstance(_out, torch.Tensor) else (y, None)

        if isinstance(index, Mlp):
            block = blocks[index.layer]
            if hasattr(block, "intermediate"):
                block.output.dense = torch.nn.Identity()
            getattr(block, "intermediate", getattr(block, "mlp", None)).register_forward_hook(
                replaced, with_kwargs=True
            )
            continue
        block = blocks[index].attention
        attention = block.self if hasattr(block, "self") else block
        attention.register_forward_hook(replaced, with_kwargs=True)
        if attention is not block:
            block.output.dense = torch.nn.Identity()
    with torch.inference_mode():
        return model(**{n: torch.from_numpy(a) for n, a in inputs.items()})


def inputs_of(place: Path, name: str) -> dict[str, np.ndarray]:
    if name == "bert":
        return ragged(place)
    return {"pixel_values": load_images(Workspace.open(place / "out" / "vit").images).heldout}


# what it computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_graph_is_pytorch_with_linear_attentions_and_mlps(
    place: Path, outs: dict[str, Path], name: str
) -> None:
    out = outs[name]
    plan, inputs = load_plan(out / "nbl" / "plan.json"), inputs_of(place, name)
    assert plan.chosen == tuple(sorted(CHOSEN))
    expected, found = by_hand(place / name, inputs, plan), run_graph(out / "model.onnx", inputs)
    real = inputs.get("attention_mask", np.ones((4, IMAGE_TOKENS))).astype(bool)
    states = found["last_hidden_state"]
    np.testing.assert_allclose(states[real], expected.last_hidden_state.numpy()[real], atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(found["pooler_output"], expected.pooler_output.numpy(), atol=2e-4)
    if name == "bert":
        mean = (expected.last_hidden_state.numpy() * real[..., None]).sum(1) / real.sum(1)[:, None]
        pooled = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(found["sentence_embedding"], pooled, atol=1e-5)
    # The attention that was fitted matters: without its W u + b the numbers are others.
    without = by_hand(place / name, inputs, plan, keep=0.0).last_hidden_state.numpy()
    assert np.abs(without - states)[real].mean() > 0.02 * np.abs(states[real]).mean()


@pytest.mark.parametrize(("name", "precision"), [("bert", "fp16"), ("vit", "bf16")])
def test_half_precision(
    place: Path, outs: dict[str, Path], tmp_path: Path, name: str, precision: str
) -> None:
    out = Path(shutil.copytree(outs[name], tmp_path / "out", copy_function=shutil.copy2))
    report = run(place, name, out, precision)
    assert report.passed, report.checks
    graph = load_graph(out / "model.onnx")
    weights = [v.const_value for v in graph.graph.initializers.values() if v.const_value is not None]
    half = sum(w.size for w in weights if w.dtype.name in ("FLOAT16", "BFLOAT16"))
    assert half > 0.95 * sum(w.size for w in weights if w.dtype.is_floating_point())
    assert {v.dtype.name for v in graph.graph.outputs} == {"FLOAT"}
    if precision == "fp16":
        inputs = inputs_of(place, name)
        expected = by_hand(place / name, inputs, load_plan(out / "nbl" / "plan.json"))
        found = run_graph(out / "model.onnx", inputs)["pooler_output"]
        np.testing.assert_allclose(found, expected.pooler_output.numpy(), atol=0.02)


# what it says ------------------------------------------------------------------------------------


def test_the_interface_has_the_names_of_optimum(outs: dict[str, Path]) -> None:
    def named(out: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        graph = load_graph(out / "model.onnx").graph
        inputs, outputs = (
            {str(v.name): [str(d) for d in v.shape] for v in side} for side in (graph.inputs, graph.outputs)
        )
        return inputs, outputs

    text, batch = ["batch_size", "sequence_length"], ["batch_size", str(WIDTH)]
    assert named(outs["bert"]) == (
        {"input_ids": text, "attention_mask": text, "token_type_ids": text},
        {"last_hidden_state": [*text, str(WIDTH)], "pooler_output": batch, "sentence_embedding": batch},
    )
    assert named(outs["vit"]) == (
        {"pixel_values": ["batch_size", "3", "32", "32"]},
        {"last_hidden_state": ["batch_size", str(IMAGE_TOKENS), str(WIDTH)], "pooler_output": batch},
    )


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_graph_of_somebody_else_is_rewritten_by_the_plan(
    place: Path, outs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    api.rewrite_onnx(
        outs[name] / "baseline" / "model.onnx", outs[name] / "nbl" / "plan.json", tmp_path / "new"
    )
    inputs = inputs_of(place, name)
    a, b = (run_graph(p / "model.onnx", inputs) for p in (tmp_path / "new", outs[name]))
    for output in a:
        np.testing.assert_array_equal(a[output], b[output])


# heads and families ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_class", "task"),
    [
        ("bert-classes", "BertForSequenceClassification", "text-classification"),
        ("bert-tokens", "BertForTokenClassification", "token-classification"),
        ("bert-mask", "BertForMaskedLM", "fill-mask"),
        ("vit-classes", "ViTForImageClassification", "image-classification"),
    ],
)
def test_heads(place: Path, tmp_path: Path, name: str, model_class: str, task: str) -> None:
    kind = name.partition("-")[0]
    make = vision_encoder if kind == "vit" else text_encoder
    folder = make(tmp_path / name, kind, model_class, num_labels=5)
    report = api.run(
        folder,
        tmp_path / "out",
        api.SelectSettings(k=2),
        calibration(place, name),
        replace(CHECKS, speed=False),
    )
    assert report.passed and report.graph.task == task
    (output,) = report.parity.outputs if isinstance(report.parity, EncoderParity) else ()
    assert (output.output, output.top1) == ("logits", 1.0)
    measures = {m.what: m.value for m in report.method_loss.measures} if report.method_loss else {}
    assert 0 < measures["top-1 agreement"] <= 1 and measures["KL to the original, nats"] > 0
    assert "top-1 agreement" in (tmp_path / "out" / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("model_type", "model_class", "fields"),
    [
        ("distilbert", "DistilBertModel", {}),
        pytest.param("mpnet", "MPNetModel", {}, marks=exhaustive),
        ("modernbert", "ModernBertModel", {"cls_token_id": CLS, "sep_token_id": SEP}),
        pytest.param(
            "deberta-v2",
            "DebertaV2Model",
            {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
            marks=exhaustive,
        ),
        pytest.param("dinov2", "Dinov2Model", {}, marks=exhaustive),
        ("siglip_vision_model", "SiglipVisionModel", {}),
    ],
)
def test_families(place: Path, tmp_path: Path, model_type: str, model_class: str, fields: Any) -> None:
    vision = model_type in ("dinov2", "siglip_vision_model")
    make = vision_encoder if vision else text_encoder
    make(tmp_path / "model", model_type, model_class, **fields)
    settings = calibration(place, "vit" if vision else "bert")
    checks = replace(CHECKS, quality=False, speed=False)
    report = api.run(tmp_path / "model", tmp_path / "out", api.SelectSettings(k=2), settings, checks)
    assert report.passed, report.checks


@pytest.mark.parametrize(
    ("model_type", "model_class", "said"),
    [
        ("albert", "AlbertModel", "all its layers run one block with the same weights"),
        ("mobilebert", "MobileBertModel", "takes and returns other states"),
        ("canine", "CanineModel", "is not given each row's tokens unchanged"),
        ("llama", "LlamaModel", "is a decoder without its language-model head"),
        ("vit_mae", "ViTMAEModel", "hides patches of its images by chance"),
        ("convbert", "ConvBertModel", "has a sum or a norm after its output projection"),
    ],
)
def test_families_that_are_refused_before_calibration(
    tmp_path: Path, model_type: str, model_class: str, said: str
) -> None:
    text = {"vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}
    fields = {"image_size": 32, "patch_size": 8} if model_type == "vit_mae" else text
    build_encoder(tmp_path / "model", model_type, model_class, **fields)
    with pytest.raises(InputError, match=said) as told:
        source = find_model(str(tmp_path / "model"))
        check_supported(load_model(source), task=task_named(source.task))
    assert "\n" not in str(told.value)


# refusals ----------------------------------------------------------------------------------------


def change_modules(folder: Path) -> None:
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    edit(folder / "modules.json", lambda modules: modules.insert(2, dense))


def last_token(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')


@pytest.mark.parametrize(
    ("name", "changes", "exporting", "said"),
    [
        (
            "bert",
            {"calibration": ("self",)},
            {},
            "cannot generate its own calibration text: name some with --calibration",
        ),
        ("vit", {"calibration": ("self",)}, {}, "cannot generate its own calibration images"),
        ("bert", {}, {"kv_cache": "concat"}, "--kv-cache concat is for decoders"),
        ("vit", {}, {"kv_cache": "static"}, "--kv-cache static is for decoders"),
        ("bert", {}, {"exporter": "optimum"}, "--exporter optimum is for decoders"),
        ("bert", {}, {"engines": True}, "--trt is for decoders"),
        ("bert", {"change": change_modules}, {}, "Pooling, Dense, Normalize: supported are a Transformer"),
        ("bert", {"change": last_token}, {}, "asks for the pooling pooling_mode_weightedmean_tokens"),
    ],
)
def test_what_an_encoder_cannot_have_is_refused_before_work(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    exporting: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr("nbl_export.stages.in_order.check_export", lambda *_: None)
    monkeypatch.setattr("nbl_export.stages.in_order.check_engines", lambda *_: None)
    model = Path(shutil.copytree(place / name, tmp_path / name))
    change: Callable[[Path], None] | None = changes.pop("change", None)
    if change:
        change(model)
    engines = api.EngineSettings("rtx") if exporting.pop("engines", False) else None
    with pytest.raises(InputError, match=said) as told:
        api.run(
            model,
            tmp_path / "out",
            api.SelectSettings(k=1),
            replace(calibration(place, name), **changes),
            exporting=api.ExportSettings(**exporting),
            engines=engines,
        )
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()


def test_a_masked_model_that_is_pooled_is_loaded_without_its_head(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "model", "bert", "BertForMaskedLM")
    as_sentence_transformer(folder, "cls_token", normalize=False)
    save_framing(folder)
    source = find_model(str(folder))
    assert source.task == "feature-extraction"
    model = load_model(source)
    assert type(model).__name__ == "BertModel" and model.pooler is None


TEXT = {"samples": 8, "seq_len": 64, "heldout_samples": 4}
HEAD_CHECKS = api.VerifySettings(contexts=(16,), rounds=3, speed=False)
SIZES = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "vocab_size": VOCAB,
    "bos_token_id": CLS,
    "eos_token_id": SEP,
}
HEADS = {
    # One layer keeps a state, which padding must not change.
    "state": (
        "minimax",
        "MiniMaxForSequenceClassification",
        {
            **SIZES,
            "head_dim": 12,
            "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
            "num_labels": 3,
        },
    ),
    "embedding": ("qwen3", "Qwen3ForCausalLM", {**SIZES, "head_dim": 12}),
}


def own(model: Any, row: dict[str, Any], embedding: bool) -> Any:
    """What transformers gives for the one text of ``row``, [1, tokens] each."""
    output = model(**{name: torch.from_numpy(array) for name, array in row.items()})
    return (
        torch.nn.functional.normalize(output.last_hidden_state[:, -1], dim=-1) if embedding else output.logits
    )


@pytest.mark.parametrize("head", ["state", "embedding"])
def test_a_row_has_the_result_of_its_text_wherever_it_is_padded(head: str, tmp_path: Path) -> None:
    kind, name, fields = HEADS[head]
    folder, embedding = tmp_path / "model", head == "embedding"
    build_encoder(folder, kind, name, **fields)
    save_framing(folder)
    if embedding:
        as_sentence_transformer(folder, "lasttoken")
    text = api.CalibrateSettings(calibration=(str(write_text(tmp_path / "text.jsonl")),), **TEXT)
    report = api.run(folder, tmp_path / "out", api.SelectSettings(k=1), text, HEAD_CHECKS)
    assert report.passed and report.method_loss is not None
    assert report.model.task == ("feature-extraction" if embedding else "text-classification")

    plan = load_plan(Workspace.open(tmp_path / "out").plan)
    made = AutoModel if embedding else AutoModelForSequenceClassification
    model = made.from_pretrained(folder).eval()
    graph = OrtModel(tmp_path / "out" / "model.onnx").encode
    output = "sentence_embedding" if embedding else "logits"
    rows = [{TOKENS: np.random.default_rng(n).integers(5, 250, (1, n))} for n in (12, 5, 9)]
    with torch.inference_mode(), linearized(model, plan):
        expected = np.concatenate([own(model, row, embedding).numpy() for row in rows])
    for left in (True, False):
        batch = batch_of_rows(rows, PAD, left)
        assert batch[MASK].min() == 0
        np.testing.assert_allclose(graph(batch)[output], expected, rtol=0, atol=2e-5)
