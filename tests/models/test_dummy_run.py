"""What one tiny forward pass says of a model, and which are refused by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertLMHeadModel, LlamaModel

from nbl_export.errors import InputError
from nbl_export.models.caches import BlockCache, CacheShape, StateShape
from nbl_export.models.dummy_run import cache_shapes, check_supported, dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from tests.encoders import IMAGE_TOKENS, text_encoder, vision_encoder
from tests.models.architectures import FAMILIES, D, build
from tests.tiny_types import tiny_model as random_model


def test_an_attention_that_is_not_run_is_refused() -> None:
    model = build("Llama", "ForCausalLM", **FAMILIES["llama"].fields)
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(InputError, match="does not run the attention of layer 1 as it is"):
        check_supported(model)


def test_a_model_that_looks_ahead_is_refused() -> None:
    # A BERT saved as a language model without is_decoder has the name of one, but sees what comes later.
    config = BertConfig(
        vocab_size=64, hidden_size=D, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    with pytest.raises(InputError, match="is not causal"):
        check_supported(model)


# what is seen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt", "deepseek_v2", "gpt_neo", "mixtral"])
def test_the_cache_has_the_shape_that_transformers_fills(model_type: str) -> None:
    model: Any = random_model(model_type)
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5]])
    with torch.inference_mode():
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    expected = [
        CacheShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers
    ]
    assert list(cache_shapes(model).values()) == expected and len(expected) == 4
    if model_type == "deepseek_v2":  # keys are longer than values
        assert expected[0].key_size != expected[0].value_size


def test_blocks_without_keys_and_values_have_no_shape() -> None:
    model = random_model("lfm2")
    convolution = BlockCache(None, (StateShape("conv", (32, 3)),))
    assert [b == convolution for b in dummy_run(model).cache] == [True, False, True, False]
    assert list(cache_shapes(model)) == [1, 3]
    check_supported(model, states=True)
    with pytest.raises(
        InputError, match=r"2 layers of Lfm2ForCausalLM are not self-attention \(layer 0: conv\)"
    ):
        check_supported(model)


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
    assert dummy_run(images).tokens == IMAGE_TOKENS and dummy_run(images).repeatable
    check_supported(images, task=features)


def test_a_decoder_without_its_head_is_no_encoder() -> None:
    config = random_model("llama").config
    with pytest.raises(InputError, match=r"decoder without its language-model head: .* LlamaForCausalLM"):
        check_supported(LlamaModel(config).eval(), task=task_named("feature-extraction"))


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
    images = transformers.VitDetModel(
        transformers.VitDetConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
        )
    ).eval()
    with pytest.raises(
        InputError, match=r"layer 0 has a stream and an input of \[2, 16, 4, 4\] and \[2, 4, 4, 16\]"
    ):
        check_supported(images, task=task_named("feature-extraction"))
    with pytest.raises(InputError, match=r"SqueezeBertModel does not run the block"):
        check_supported(
            transformers.SqueezeBertModel(
                transformers.SqueezeBertConfig(
                    vocab_size=50,
                    hidden_size=16,
                    embedding_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    intermediate_size=32,
                    q_groups=1,
                    k_groups=1,
                    v_groups=1,
                    intermediate_groups=1,
                    output_groups=1,
                )
            ).eval(),
            task=task_named("feature-extraction"),
        )


def test_a_configuration_without_a_number_of_layers_is_refused() -> None:
    levit = transformers.LevitModel(transformers.LevitConfig()).eval()
    with pytest.raises(InputError, match=r"The configuration of LevitModel has no num_hidden_layers"):
        check_supported(levit, task=task_named("feature-extraction"))
