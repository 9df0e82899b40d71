"""Loading: what is refused although it looked right, in which precision a model comes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.errors import InputError
from nbl_export.models.folder import PREPROCESSOR
from nbl_export.models.load import (
    check_processor,
    in_precision,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from nbl_export.models.source import find_model
from nbl_export.models.weights import dtype_of, resident
from tests.encoders import build, vision_encoder
from tests.models.spoiled import edit_config, one_sentence


def load_refusal(source: Path | str) -> str:
    """The sentence with which a model is refused, at the latest while loading."""
    with pytest.raises(InputError) as caught:
        load_model(find_model(str(source)))
    return one_sentence(caught)


def test_a_gguf_file_that_is_only_magic(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert "transformers cannot load" in load_refusal(tmp_path / "fake.gguf")


def small_gguf(path: Path, seed: int) -> Path:
    """A Llama of one block, without a tokenizer."""
    numbers = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    block = {
        "attn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_norm": (32,),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }
    shapes = {"token_embd": (40, 32), "output_norm": (32,), **{f"blk.0.{n}": s for n, s in block.items()}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_nothing_beside_a_gguf_file_is_loaded_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_gguf(tmp_path / "m.gguf", 1)
    (tmp_path / "adapter_config.json").write_text("{}")
    listed: list[list[str]] = []
    own = AutoConfig.from_pretrained

    def read(folder: str, **options: Any) -> Any:
        listed.append([p.name for p in Path(folder).iterdir()])
        return own(folder, **options)

    def load(*_: Any, **_options: Any) -> Any:
        pytest.fail("its tensors are read from the file, one by one")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_model(find_model(str(path)))
    assert listed == [[]]


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


def test_a_half_precision_model_is_loaded_in_float32(folder: Path) -> None:
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model: Any = load_model(find_model(str(folder)))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert dtype_of(model) == "float32" and model.config.dtype == torch.float32
    with resident(model):
        assert model.state_dict()[name].dtype == torch.float32
        assert torch.equal(model.state_dict()[name], weights[name].float())


# precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_copy_in_half_keeps_what_no_checkpoint_holds(tiny_folder: Path, dtype: str) -> None:
    model: Any = load_model(find_model(str(tiny_folder)))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    half: Any = in_precision(model, dtype)
    kind = getattr(torch, dtype)
    with resident(half):
        assert {p.dtype for p in half.parameters()} == {kind}
        for name, weight in model.state_dict().items():
            assert weight.dtype == torch.float32 and torch.equal(half.state_dict()[name], weight.to(kind)), (
                name
            )
    found = half.model.rotary_emb.inv_freq
    assert found.dtype == torch.float32 and torch.equal(found, frequencies)
    assert found.data_ptr() != model.model.rotary_emb.inv_freq.data_ptr()
    # As transformers loads it.
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=kind).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(half(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a_class_that_no_auto_class_makes_is_named(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is saved as T5EncoderModel, and AutoModel .* T5Model .* decoder"):
        load_model(find_model(str(tmp_path)))


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


def test_bert_for_pretraining_gives_the_logits_of_its_tokens(tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    build(tmp_path, "bert", "BertForPreTraining", vocab_size=50, pad_token_id=0)
    model = load_model(find_model(str(tmp_path)))
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        expected = BertForPreTraining.from_pretrained(tmp_path).eval()(input_ids=ids).prediction_logits
        assert torch.equal(model(input_ids=ids).logits, expected)


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
    folder = build(
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
