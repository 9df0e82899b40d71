"""The language models inside multimodal checkpoints: found, loaded without the towers, to a verified graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

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
from nbl_export.models.layers import backbone
from nbl_export.models.multimodal import TextDecoder
from nbl_export.models.source import find_model
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.verify.parity.figures import MethodLoss
from tests.clients.test_generating import by_genai, greedy
from tests.conftest import exhaustive
from tests.end_to_end.test_matrix import ROWS, parity
from tests.exporters import GRAPH
from tests.families import LAYERS, VOCAB, Calibrated
from tests.fixtures_graph import load
from tests.multimodal import LENDING, WRAPPERS, whole
from tests.pictures import PLACE, picture, save_documents, save_processor
from tests.processes import Notes, edit


def own(name: str) -> Any:
    """transformers' model with all its towers; of Llama 4, whose wrapper fails without an image, what is inside."""
    model = whole(name)
    return model.language_model if name == "llama4" else model


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_logits_are_the_wrappers(name: str, wrapper_folder: Callable[[str], Path]) -> None:
    ids = torch.from_numpy(np.random.default_rng(5).integers(3, VOCAB - 10, (2, 24)))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = own(name)(input_ids=ids, attention_mask=mask).logits
        found = load(wrapper_folder(name))(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# what is not served ------------------------------------------------------------------------------

_TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_VISION = {**_TINY, "image_size": 28, "patch_size": 14}
_FORMER = {**_TINY, "encoder_hidden_size": 32}
_T5 = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 32,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "d_kv": 16,
}
_ALIKE = {"text_config": _TINY, "vision_config": _VISION}
REFUSED = {
    "CLIPModel": (
        "clip",
        _ALIKE,
        "is several models in one (CLIPModel: text_config, vision_config): save the one",
    ),
    "Gemma3Model": (
        "gemma3",
        {"vision_config": _VISION},
        "save it with its language-model head, as Gemma3ForConditionalGeneration.",
    ),
    "Blip2ForConditionalGeneration": (
        "blip-2",
        {"text_config": _T5, "vision_config": _VISION, "qformer_config": _FORMER, "num_query_tokens": 2},
        "is an encoder-decoder model (blip-2)",
    ),
    "BlipForImageTextRetrieval": ("blip", _ALIKE, "has no language model with a head that gives logits"),
    "WhisperForConditionalGeneration": (
        "whisper",
        {"vocab_size": 40},
        "is an encoder-decoder model (whisper)",
    ),
    "SiglipForImageClassificationAndMore": ("siglip", _ALIKE, "is not in this version of transformers"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_wrapper_without_a_decoder_is_refused_before_its_weights_are_read(
    architecture: str, tmp_path: Path
) -> None:
    model_type, fields, words = REFUSED[architecture]
    config = AutoConfig.for_model(model_type, **fields)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    # As many bytes as any of them needs; what they hold is never looked at.
    save_file({f"x{i}": torch.zeros(1 << 18) for i in range(40)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        find_model(str(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_tower_of_timm_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may fetch what a configuration names; it is not needed, and need not be installed."""
    text = {**_TINY, "model_type": "qwen2", "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "timm_wrapper", "architecture": "hf-hub:somebody/else", "hidden_size": 8}
    config = AutoConfig.for_model("fast_vlm", text_config=text, vision_config=vision, image_token_id=3)
    monkeypatch.setattr(
        "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel.__init__",
        lambda *_: pytest.fail("built"),
    )
    config.architectures = ["FastVlmForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config.text_config)
    weights = {
        f"model.language_{name}" if "lm_head" not in name else name: w
        for name, w in model.state_dict().items()
    }
    save_file(
        {k: w.contiguous() for k, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    source = find_model(str(tmp_path))
    assert source.towers == ("model.vision_tower", "model.multi_modal_projector")
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path)(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_decoder_with_a_tower_that_nobody_reads_is_an_ordinary_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tower = {"model_type": "siglip_vision_model"}
    edit(folder / "config.json", lambda config: config.update(vision_config=tower))
    source = find_model(str(folder))
    assert (source.wrapper, source.towers) == ("", ())


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "phi4-multimodal"])
def test_a_cache_embeddings_and_kept_logits(name: str, wrapper: Callable[[str], Calibrated]) -> None:
    """Decoding with the cache that it returns, and reading embeddings, gives the logits of one pass over the ids."""
    model: Any = wrapper(name).model
    assert isinstance(model, TextDecoder) and backbone(model) is model.model
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :9], use_cache=True)
        rest = model(input_ids=ids[:, 9:], use_cache=True, cache=first.cache).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        last = model(input_ids=ids, logits_to_keep=2).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(embedded, whole)
    torch.testing.assert_close(last, whole[:, -2:], rtol=0, atol=1e-5)
    assert model.get_output_embeddings().weight.shape[0] == VOCAB


# multimodal --------------------------------------------------------------------------------------

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
