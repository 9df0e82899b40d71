"""The language models inside multimodal checkpoints: found, loaded without the towers, and right.

What is held against: transformers' own wrapper with all its towers, and the same weights as a plain text model.
"""

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

from nbl_export.errors import InputError
from nbl_export.models.layers import backbone
from nbl_export.models.multimodal import TextDecoder
from nbl_export.models.source import find_model
from tests.families import VOCAB, Calibrated
from tests.fixtures_graph import load
from tests.multimodal import WRAPPERS, whole


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
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"model_type": "siglip_vision_model"}
    (folder / "config.json").write_text(json.dumps(config))
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
