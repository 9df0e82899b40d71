"""A multimodal checkpoint from its folder to a verified graph, and to tokens of onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbl_export import api
from nbl_export.batch import are_media
from nbl_export.blocks import attentions
from nbl_export.calibrate.text import load_text
from nbl_export.errors import InputError
from nbl_export.export.checks import check_form
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch, save_in_precision
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.verify.parity.figures import MethodLoss
from tests.clients.test_generating import by_genai, greedy
from tests.conftest import exhaustive
from tests.end_to_end.test_matrix import ROWS, parity
from tests.exporters import GRAPH
from tests.families import LAYERS, Calibrated
from tests.multimodal import LENDING, WRAPPERS
from tests.pictures import PLACE, picture, save_documents, save_processor
from tests.processes import Notes

PROMPT, COUNT = [5, 9, 33, 77, 120, 44, 8, 91, 17, 3], 12


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "went",
    "away",
    "to",
    "find",
    "food",
    "by",
    "the",
    "river",
]


def with_media(name: str, folder: Path, root: Path) -> tuple[Path, Path]:
    """A copy of the model in ``folder`` with its processor, and documents, of which two of three have an image."""
    model = save_processor(name, Path(shutil.copytree(folder, root / "model")))
    numbers = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for i in range(90):
        before, after = (" ".join(numbers.choice(WORDS, 4)) for _ in range(2))
        picture(i).save(root / f"{i}.png")
        files = {"images": [f"{i}.png"]} if i % 3 else {}
        rows.append({"text": f"{before} {PLACE[name] if i % 3 else ''} {after}", **files})
    return model, save_documents(root, rows)


def verified(model: Path, out: Path, asked: api.CalibrateSettings) -> api.Report:
    """The report of a run stage by stage with embeddings as inputs, which passes."""
    api.calibrate(model, out, asked)
    api.select(out, api.SelectSettings(k=1))
    api.export(out, api.ExportSettings(inputs="embeds"))
    api.rewrite(out)
    report = api.verify(out, api.VerifySettings(speed=False))
    assert report.passed
    return report


def test_images_are_calibrated_on(wrapper_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Every stage; another image is another calibration; losses are of the words."""
    model, documents = with_media("gemma3", wrapper_folder("gemma3"), tmp_path)
    out = tmp_path / "out"
    asked = api.CalibrateSettings(
        (str(documents),), samples=12, seq_len=64, heldout_samples=4, selection_samples=3
    )
    report = verified(model, out, asked)
    text = load_text(out / "nbl" / "text.safetensors")
    there = are_media(text.heldout)
    assert text.media is not None and there.any() and (text.heldout_document[there] == -1).all()
    assert isinstance(report.method_loss, MethodLoss)
    assert report.method_loss.tokens == int((~there[:, 1:]).sum())
    (check,) = [check for check in report.checks if check.name == "parity with media"]
    assert check.status == "passed" and "over 2 texts with images or sounds" in check.detail
    (said,) = [note for note in report.notes if "Images are " in note]
    assert f"{int(there.sum())} of 256 held-out tokens" in said

    notes = Notes()
    api.calibrate(model, out, asked, notes)
    assert [note for note in notes.notes if "done already" in note]
    picture(999).save(tmp_path / "1.png")
    api.calibrate(model, out, asked, notes)
    assert [note for note in notes.notes if "done again" in note]
    # On text alone, nothing of the images is left.
    words = tmp_path / "words.txt"
    words.write_text("\n".join(" ".join(WORDS) for _ in range(2000)))
    api.calibrate(model, out, api.CalibrateSettings((str(words),), samples=12, seq_len=64, heldout_samples=4))
    assert not (out / "nbl" / "media.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "inputs", "precision", "cache"),
    [
        pytest.param("gemma3", "ids", "fp32", "concat", marks=exhaustive),
        ("qwen2.5-vl", "embeds", "fp16", "static"),
    ],
)
def test_every_stage(
    name: str,
    inputs: str,
    precision: str,
    cache: str,
    wrapper_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.jsonl"
    numbers = np.random.default_rng(0)
    rows = [json.dumps({"text": " ".join(numbers.choice(WORDS, 60))}) for _ in range(150)]
    text.write_text("\n".join(rows))
    report = api.run(
        wrapper_folder(name),
        out,
        api.SelectSettings(layers=(1, 3)),
        api.CalibrateSettings((str(text),), samples=16, seq_len=64, heldout_samples=4),
        api.VerifySettings(speed=False, quality=False),
        exporting=api.ExportSettings(precision=precision, kv_cache=cache, inputs=inputs),  # type: ignore[arg-type]
    )
    assert report.passed
    architecture = WRAPPERS[name].architecture
    assert report.model.wrapper == architecture and "vis" in " ".join(report.model.towers)
    assert [
        note
        for note in report.notes
        if f"{architecture} is multimodal" in note and report.model.towers[0] in note
    ]
    (first, *_) = api.inspect(out)
    assert first.title.endswith(f", the language model of {architecture}")

    config = json.loads((out / "config.json").read_text())
    assert "vision_config" not in config and config["num_hidden_layers"] == 4
    assert config.get("architectures") == (["Gemma3ForCausalLM"] if name == "gemma3" else None)
    assert (out / "embedding.onnx").is_file() == (inputs == "embeds")
    logits = ort_stream(out / "model.onnx", 64).prefill([np.array(PROMPT)])
    assert logits.shape == (len(PROMPT), 260) and np.isfinite(logits).all()
    if inputs == "ids":
        assert by_genai(out, PROMPT, COUNT) == greedy(out / "model.onnx", PROMPT, COUNT)
        return
    # Exported again with token ids, the embedding of the other export is gone, and nothing else is done again.
    api.export(out, api.ExportSettings(precision="fp32", kv_cache="concat"))
    api.rewrite(out)
    assert not (out / "embedding.onnx").exists()
    assert by_genai(out, PROMPT, COUNT) == greedy(out / "model.onnx", PROMPT, COUNT)


def test_embeddings_are_for_our_exporter_and_for_decoders() -> None:
    for asked, words in (
        (api.ExportSettings(inputs="embeds", exporter="genai"), "is for --exporter torch, not for genai"),
        (api.ExportSettings(inputs="both"), "inputs"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=words):
            asked.check()
    with pytest.raises(InputError, match="Engines are built of decoders that read token ids"):
        api.ExportSettings(inputs="embeds", kv_cache="static").check_tensorrt()


# Found by another structure than the others.
_USUAL = ("gemma3", "gemma4")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(pytest.param(name, "concat", marks=() if name in _USUAL else exhaustive) for name in WRAPPERS),
        ("qwen2.5-vl", "static"),
        ("llama4", "static"),
        pytest.param("llava", "none", marks=exhaustive),
    ],
)
def test_graph(name: str, form: str, wrapper: Callable[[str], Calibrated], tmp_path: Path) -> None:
    """Ragged prefill and decode, one linear layer and half of them; in half precision half of them."""
    case = wrapper(name)
    check_form(case.model, FORMS[form])
    source = tmp_path / GRAPH
    export_torch(case.model, source, form=FORMS[form])
    candidates = attentions(case.moments.layers)
    for k, layers in (("one", candidates[:1]), ("half", candidates[1::2])):
        plan = case.plan(layers)
        result = rewrite_file(source, plan, tmp_path / k / GRAPH)
        if form != "none" and name not in LENDING:
            assert (result.before.kv_pairs, result.after.kv_pairs) == (LAYERS, LAYERS - len(plan.chosen))
        assert parity(case.model, plan, tmp_path / k / GRAPH).failures() == []
    for precision in ("fp16", "bf16") if (name, form) == ("gemma3", "concat") else ():
        half = tmp_path / precision / GRAPH
        half.parent.mkdir()
        save_in_precision(load_graph(source), half, precision_of(precision), ROWS)
        rewrite_file(half, plan, half.parent / "half.onnx")
        assert (
            parity(case.model, plan, half.parent / "half.onnx", precision_of(precision).gates).failures()
            == []
        )
