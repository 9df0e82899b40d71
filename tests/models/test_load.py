"""Loading: what is refused although it looked right, in which precision a model comes."""

from __future__ import annotations

import gc
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.errors import InputError
from nbl_export.models import load
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.folder import PREPROCESSOR
from nbl_export.models.load import check_processor, load_image_processor, load_model, load_tokenizer
from nbl_export.models.loaded import LoadedModel, why_not_run
from nbl_export.models.source import find_model
from nbl_export.models.tasks import Pooling
from nbl_export.models.weights import dtype_of, resident
from nbl_export.progress import Silent
from tests import encoders
from tests.encoders import as_sentence_transformer, text_encoder, vision_encoder
from tests.listening import Notes
from tests.models.spoiled import edit_config, one_sentence, small_gguf
from tests.models.test_weights import stored_in
from tests.tiny import build, save_tokenizer
from tests.tiny_types import tiny_model


def load_refusal(source: Path | str) -> str:
    """The sentence with which a model is refused, at the latest while loading."""
    with pytest.raises(InputError) as caught:
        load_model(find_model(str(source)))
    return one_sentence(caught)


def test_a_gguf_file_that_is_only_magic(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert "transformers cannot load" in load_refusal(tmp_path / "fake.gguf")


def test_a_gguf_file_of_the_same_name_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks for a bare name there first."""
    for name in ("model", "elsewhere"):
        (tmp_path / name).mkdir()
    model = find_model(str(small_gguf(tmp_path / "model" / "m.gguf", 1)))
    small_gguf(tmp_path / "elsewhere" / "m.gguf", 2)
    here: Any = load_model(model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    there: Any = load_model(model)
    with resident(here), resident(there):
        assert torch.equal(here.get_input_embeddings().weight, there.get_input_embeddings().weight)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert name in load_refusal(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(folder: Path, bad: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][2, 3] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"the weight {name} is NaN or infinite" in load_refusal(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, hidden_size=64)
    assert f"transformers cannot load {folder}" in load_refusal(folder)


def test_an_architecture_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    known = (
        f"{folder} has an architecture that transformers {transformers.__version__} does not know: install "
    )
    assert load_refusal(folder).startswith(known)


def test_a_tokenizer_that_cannot_be_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load_tokenizer(find_model(str(folder)))
    assert f"No tokenizer can be loaded from {folder}" in one_sentence(caught)


# precision ---------------------------------------------------------------------------------------


def test_a_decoder_that_the_class_of_its_task_does_not_list_is_loaded_by_its_own(tmp_path: Path) -> None:
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
    }
    latent = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    tokens = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model("mistral4", hidden_size=16, **sizes, **latent, **experts, **tokens)
    own = transformers.Mistral4ForCausalLM(config).eval()
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(config)
    ids = torch.arange(6)[None]
    found = load_model(find_model(str(tmp_path)))
    assert torch.equal(found(input_ids=ids).logits, own(input_ids=ids).logits)


# processors --------------------------------------------------------------------------------------


def test_a_folder_without_a_vocabulary_has_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    source = find_model(str(folder))
    with pytest.raises(InputError) as caught:
        check_processor(source)
    assert one_sentence(caught) == (
        f"{folder} has no tokenizer: put the tokenizer.json, or the tokenizer.model, of the model into {folder}."
    )
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(source)


def test_a_tokenizer_of_characters_needs_no_file(tmp_path: Path) -> None:
    """CANINE's has the code points of Unicode: nothing of it is in the folder."""
    folder = encoders.build(
        tmp_path / "m",
        "canine",
        "CanineModel",
        max_position_embeddings=64,
        num_hash_buckets=64,
        upsampling_kernel_size=4,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))
    source = find_model(str(folder))
    check_processor(source)
    assert load_tokenizer(source)("ab")["input_ids"][1:3] == [ord("a"), ord("b")]


def test_an_image_processor_that_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs pillow: pip install 'nbl-export[vision]'")
    folder = vision_encoder(tmp_path / "vit")
    source = find_model(str(folder))
    check_processor(source)
    assert load_image_processor(source).size["height"] == 32
    (folder / PREPROCESSOR).unlink()
    for refused in (check_processor, load_image_processor):
        with pytest.raises(InputError, match=r"has no preprocessor_config\.json, which says how its images"):
            refused(source)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every function of loading that runs."""
    ran: list[str] = []
    for name in ("load_model", "load_tokenizer", "load_image_processor", "in_precision"):
        plain = getattr(load, name)

        def counting(*args: Any, name: str = name, plain: Any = plain) -> Any:
            ran.append(name)
            return plain(*args)

        monkeypatch.setattr(load, name, counting)
    return ran


def test_nothing_is_loaded_before_it_is_asked_for_and_then_once(
    tiny_folder: Path, counted: list[str]
) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(tiny_folder)), listener)
    assert model.task.name == "text-generation" and model.pooling is None
    assert counted == [] and listener.tasks == []
    assert model.model is model.model and model.tokenizer is model.tokenizer
    assert counted == ["load_model", "load_tokenizer"]
    assert listener.tasks == [(f"Loading {tiny_folder.name}", 1, "model", 0)] and listener.advanced == [1]


def test_a_large_model_is_loaded_with_progress_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored_in(build(tmp_path / "m", hidden_size=512, vocab_size=3000), torch.bfloat16)
    monkeypatch.setattr("nbl_export.models.loaded._LONG", 1 << 20)
    listener = Notes()
    assert LoadedModel(find_model(str(folder)), listener).model is not None
    mib = (folder / "model.safetensors").stat().st_size >> 20
    assert listener.tasks == [("Loading m", mib, "MiB", 0)] and mib >= 2
    assert len(listener.advanced) > 1 and sum(listener.advanced) == mib


def test_a_copy_is_shared_while_somebody_has_it(tiny_folder: Path, counted: list[str]) -> None:
    model = LoadedModel(find_model(str(tiny_folder)), Silent())
    assert model.in_dtype("float32") is model.model
    half = model.in_dtype("bfloat16")
    assert half is model.in_dtype("bfloat16") and half is not model.model
    assert counted.count("in_precision") == 1
    assert dtype_of(half) == "bfloat16" and {p.dtype for p in model.model.parameters()} == {torch.float32}
    del half
    gc.collect()
    again = model.in_dtype("bfloat16")
    assert counted.count("in_precision") == 2, "the first copy was not kept for nobody"
    original = next(model.model.parameters()).detach().numpy()
    with resident(again):
        rounded = next(again.parameters()).detach().float().numpy()
    # bfloat16 keeps eight binary digits.
    np.testing.assert_allclose(rounded, original, rtol=2**-8, atol=0)


@pytest.mark.parametrize("fastest", ["float32", "bfloat16"])
def test_auto_is_what_the_machine_is_fastest_in(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    monkeypatch.setattr(load, "fast_dtype", lambda *_: fastest)
    found = LoadedModel(find_model(str(tiny_folder)), Silent()).in_dtype("auto")
    assert dtype_of(found) == fastest


def test_encoders_have_what_reads_their_inputs(tmp_path: Path, counted: list[str]) -> None:
    text = LoadedModel(find_model(str(as_sentence_transformer(text_encoder(tmp_path / "bert")))), Silent())
    assert text.pooling == Pooling("mean", True, ("modules.json", "1_Pooling/config.json"))
    assert text.tokenizer("ab")["input_ids"] == [257, *text.tokenizer.convert_tokens_to_ids(["a", "b"]), 258]
    pytest.importorskip("PIL", reason="needs pillow: pip install 'nbl-export[vision]'")
    images = LoadedModel(find_model(str(vision_encoder(tmp_path / "vit"))), Silent())
    assert images.image_processor is images.image_processor
    assert counted == ["load_tokenizer", "load_image_processor"]
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        LoadedModel(find_model(str(tmp_path / "vit")), Silent()).image_processor  # noqa: B018


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that keeps a table in float32, on a machine that is fastest in bfloat16."""
    monkeypatch.setattr(load, "fast_dtype", lambda *_: "bfloat16")
    tiny_model("xglm").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_whose_code_does_not_run_fast_is_run_in_float32(mixed: Path, tiny_folder: Path) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(mixed)), listener)
    assert dtype_of(model.in_dtype("auto")) == "float32" == model.fast_dtype
    assert [note for note in listener.notes if "does not run in bfloat16" in note] == listener.notes[-1:]
    with pytest.raises(InputError, match=r"does not run in bfloat16 .*: use --calibration-dtype float32\.$"):
        model.in_dtype("bfloat16")
    other = LoadedModel(find_model(str(tiny_folder)), Silent())
    assert dtype_of(other.in_dtype("auto")) == "bfloat16" == other.fast_dtype


def test_what_does_not_run_says_why_in_a_line() -> None:
    model: Any = tiny_model("llama")
    dummy_run(model)
    model.model.norm.to(torch.bfloat16)
    model.model.layers[0].mlp.to(torch.bfloat16)
    why = why_not_run(model)
    assert why is not None and "dtype" in why and "\n" not in why
