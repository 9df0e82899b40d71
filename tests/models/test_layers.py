"""The attention of every served family is found and observed; what one tiny pass says; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertLMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from nbl_export.errors import InputError
from nbl_export.files import read_table
from nbl_export.models import layers
from nbl_export.models.candidates import check_supported
from nbl_export.models.dummy_run import BlockCache, dummy_run
from nbl_export.models.folder import task_named
from nbl_export.models.layers import Family as Row
from nbl_export.models.layers import attention_layers, structure
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests.conftest import ROOT
from tests.encoders import IMAGE_TOKENS, text_encoder, vision_encoder
from tests.families import unsaved
from tests.tiny_types import tiny_model
from tests.tiny_types import tiny_model as random_model

IDS = torch.tensor([[5, 9, 3, 44, 7], [8, 2, 2, 31, 30]])
# By a reading of their source: a norm, and what writes y.
PLACES = {
    "llama": ("model.layers.{}.input_layernorm", "model.layers.{}.self_attn.o_proj"),
    "gpt2": ("transformer.h.{}.ln_1", "transformer.h.{}.attn.c_proj"),
    "opt": ("model.decoder.layers.{}.self_attn_layer_norm", "model.decoder.layers.{}.self_attn.out_proj"),
}


# refused -----------------------------------------------------------------------------------------


def refusal(model: Any) -> str:
    with pytest.raises(InputError) as caught:
        attention_layers(model)
    message = str(caught.value)
    assert message.endswith("this architecture is not supported yet.")
    return message


def test_a_model_without_attention() -> None:
    model = tiny_model("mamba", num_hidden_layers=2, state_size=4)
    assert "MambaForCausalLM has no list of its 2 layers in which an attention is known" in refusal(model)


def test_a_block_with_two_attentions() -> None:
    model = tiny_model("llama")
    model.model.layers[1].second = model.model.layers[0].self_attn
    assert "Layer 1 (LlamaDecoderLayer) has 2 attention modules where one is expected" in refusal(model)


def test_other_layers_are_no_candidates() -> None:
    kinds = ["conv", "full_attention"]
    model = tiny_model("lfm2", num_hidden_layers=2, layer_types=kinds)
    found = structure(model)
    assert [layer.index for layer in found.layers] == [kinds.index("full_attention")]
    assert found.others == {kinds.index("conv"): "conv"}
    check_supported(model, cached=False)
    with pytest.raises(
        InputError,
        match=rf"1 layers .* \(layer {kinds.index('conv')}: conv\).*--exporter torch with --kv-cache concat",
    ):
        check_supported(model)


def test_a_family_is_refused_for_the_reason_in_its_row() -> None:
    model = tiny_model("jetmoe", num_hidden_layers=2, num_key_value_heads=2, kv_channels=8)
    with pytest.raises(
        InputError, match="JetMoeForCausalLM is not supported: its attention sends every token"
    ):
        check_supported(model)


def test_an_attention_that_adds_the_residual_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # BLOOM's attention returns h + y: fitting that as y would be wrong without any sign of it.
    model = unsaved("bloom")
    assert all(layer.adds == "residual" for layer in attention_layers(model))
    monkeypatch.setattr(layers, "family_of", lambda _: Row())
    assert "adds the residual itself" in refusal(model)


TABLE = read_table(ROOT / "nbl_export" / "models" / "families.toml")


def test_a_model_type_is_of_one_row_and_known_to_transformers() -> None:
    names = [name for row in TABLE.values() for name in row["models"]]
    assert len(names) == len(set(names))
    assert not set(names) - set(CONFIG_MAPPING_NAMES)


# one tiny pass ------------------------------------------------------------------------------------


def test_an_attention_that_is_not_run_is_refused() -> None:
    model: Any = random_model("llama")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(InputError, match="does not run the attention of layer 1 as it is"):
        check_supported(model)


def test_a_model_that_looks_ahead_is_refused() -> None:
    # A BERT saved as a language model without is_decoder has the name of one, but sees what comes later.
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    with pytest.raises(InputError, match="is not causal"):
        check_supported(model)


# what is seen ------------------------------------------------------------------------------------


def test_an_encoder_sees_both_ways_and_all_its_tokens(tmp_path: Path) -> None:
    features = task_named("feature-extraction")
    text = load_model(find_model(str(text_encoder(tmp_path / "bert"))))
    found = dummy_run(text)
    assert (
        not found.causal and found.tokens == 8 and found.linear_output and found.cache == (BlockCache(),) * 4
    )
    assert set(found.outputs) == {"last_hidden_state", "pooler_output"}
    check_supported(text, task=features)
    with pytest.raises(InputError, match="BertModel is not causal"):
        check_supported(text)
    images = load_model(find_model(str(vision_encoder(tmp_path / "vit"))))
    # Patches and one more: not what is read, but what attention sees.
    assert dummy_run(images).tokens == IMAGE_TOKENS
    check_supported(images, task=features)


def test_a_model_that_cannot_be_run_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = random_model("llama")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel\nand a long story")

    model.model.layers[3].mlp.forward = broken
    with pytest.raises(InputError, match=r"^LlamaForCausalLM cannot be run: no such kernel\.$"):
        dummy_run(model)


def test_a_block_that_runs_twice_in_a_pass_is_refused() -> None:
    # Of its states in each of both runs W and b could be right for one.
    with pytest.raises(
        InputError, match=r"^DoryForCausalLM runs block 1 2 times in one pass, each with other"
    ):
        dummy_run(random_model("dory"))
    dummy_run(random_model("dory", n_recurrent_loops=1))


def test_attention_of_another_form_is_refused() -> None:
    model = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    ).eval()
    with pytest.raises(
        InputError,
        match=r"takes and returns other states than \[rows, tokens, width\] \(layer 0 .* an output of a list",
    ):
        check_supported(model)
