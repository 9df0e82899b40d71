"""Tiny random multimodal models, one row of data each: what the language model inside needs, and towers as small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from nbl_export.models.multimodal import without_timm
from tests.families import HEAD_SIZE, HEADS, LAYERS, VOCAB, WIDTH, Calibrated, calibrated
from tests.tiny import save_tokenizer
from tests.tiny_types import scale_up

_TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,  # as many blocks as the language model
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_WINDOW = {"sliding_window": 8, "layer_types": _ALTERNATING}
_IMAGE = {"image_token_id": 250, "image_token_index": 250}
_ROWS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    }
}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
_QWEN = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
_PER_LAYER = {
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,  # of four: the others lend them their keys and values, and are no candidates
}


@dataclass(frozen=True)
class Wrapper:
    """A class of transformers, its ``model_type``, and what its configuration has."""

    architecture: str
    model_type: str
    text: Mapping[str, Any] = field(default_factory=dict)
    towers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The configuration; one without a row for its text has the text's fields itself."""
        flat = self.model_type in ("phi4_multimodal",)
        own = {**_TEXT, **self.text} if flat else {"text_config": {**_TEXT, **self.text}}
        return AutoConfig.for_model(self.model_type, **own, **self.towers, **self.fields)


_GEMMA4_TEXT = {
    **_PER_LAYER,
    **_WINDOW,
    "global_head_dim": HEAD_SIZE,
    "num_global_key_value_heads": 2,
    "final_logit_softcapping": 5.0,
}
_GEMMA4_TOWERS = {
    "vision_config": {**_TOWER, "head_dim": HEAD_SIZE, "num_key_value_heads": 2, "patch_size": 4},
    "audio_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "subsampling_conv_channels": [16, 4],
        "output_proj_dims": 32,
    },
}
_GEMMA4 = {
    "boi_token_id": 246,
    "eoi_token_id": 247,
    "boa_token_id": 248,
    "eoa_token_index": 249,
    "image_token_id": 250,
    "audio_token_id": 251,
    "video_token_id": 252,
}
_CLIP = {"model_type": "clip_vision_model", **_TOWER, "projection_dim": 32}
WRAPPERS = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {**_WINDOW, "query_pre_attn_scalar": HEAD_SIZE, "tie_word_embeddings": True},
        {"vision_config": _TOWER},
        {"mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252},
    ),
    "gemma3n": Wrapper(
        "Gemma3nForConditionalGeneration",
        "gemma3n",
        {
            **_PER_LAYER,
            **_WINDOW,
            "vocab_size": VOCAB + 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * LAYERS,
            "intermediate_size": [96] * LAYERS,
            "altup_num_inputs": 2,
            "final_logit_softcapping": 5.0,
        },
        {
            # Which is not one of timm's own, so that nobody builds it.
            "vision_config": {
                "architecture": "hf-hub:somebody/else",
                "hidden_size": 32,
                "vocab_size": 8,
                "vocab_offset": 260,
            },
            "audio_config": {
                "hidden_size": 32,
                "vocab_size": 8,
                "vocab_offset": 268,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 2,
                "sscp_conv_channel_size": [4, 4],
            },
        },
        {
            "image_token_id": 261,
            "audio_token_id": 269,
            "vision_soft_tokens_per_image": 4,
            "audio_soft_tokens_per_image": 12,
        },
    ),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", "gemma4", _GEMMA4_TEXT, _GEMMA4_TOWERS, _GEMMA4),
    # As the larger ones: no embeddings of each layer, no sounds, and layers with a window see all of an image.
    "gemma4-both-ways": Wrapper(
        "Gemma4ForConditionalGeneration",
        "gemma4",
        {
            **_GEMMA4_TEXT,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_bidirectional_attention": "vision",
        },
        _GEMMA4_TOWERS,
        _GEMMA4,
    ),
    "qwen2-vl": Wrapper(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        _ROWS,
        {"vision_config": {**_QWEN_TOWER, "hidden_size": WIDTH}},
        _QWEN,
    ),
    "qwen2.5-vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", _ROWS, {"vision_config": _QWEN_TOWER}, _QWEN
    ),
    "qwen3-vl": Wrapper(
        "Qwen3VLForConditionalGeneration", "qwen3_vl", _ROWS, {"vision_config": _QWEN_TOWER}, _QWEN
    ),
    "glm4v": Wrapper(
        "Glm4vForConditionalGeneration",
        "glm4v",
        {
            "rope_parameters": {
                **_ROWS["rope_parameters"],
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        },
        {"vision_config": {**_QWEN_TOWER, "image_size": 28}},
        {**_QWEN, "image_start_token_id": 252, "image_end_token_id": 253},
    ),
    "qwen2-audio": Wrapper(
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio",
        {"model_type": "qwen2"},
        {
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 32,
                "max_source_positions": 50,
            }
        },
        {"audio_token_index": 250},
    ),
    "llama4": Wrapper(
        "Llama4ForConditionalGeneration",
        "llama4",
        {
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "attention_chunk_size": 256,
            "attn_temperature_tuning": False,
        },
        {
            "vision_config": {
                **_TOWER,
                "intermediate_size": 128,  # as wide as four patches side by side
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            }
        },
        {"image_token_index": 250},
    ),
    "llava": Wrapper(
        "LlavaForConditionalGeneration",
        "llava",
        {"model_type": "llama"},
        {"vision_config": _CLIP},
        {**_IMAGE, "image_seq_length": 4},
    ),
    "llava-next": Wrapper(
        "LlavaNextForConditionalGeneration",
        "llava_next",
        {"model_type": "mistral", "sliding_window": 8},
        {"vision_config": _CLIP},
        {**_IMAGE, "image_grid_pinpoints": [[28, 28], [28, 56]]},
    ),
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": HEAD_SIZE}},
        {**_IMAGE, "vision_feature_layer": -1},
    ),
    "phi4-multimodal": Wrapper(
        "Phi4MultimodalForCausalLM",
        "phi4_multimodal",
        {"original_max_position_embeddings": 256, "partial_rotary_factor": 1.0},
        {
            "vision_config": {**_TOWER, "image_size": 448, "image_token_id": 250},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 8,
                "depthwise_separable_out_channel": 32,
                "audio_token_id": 251,
            },
        },
    ),
    "idefics3": Wrapper(
        "Idefics3ForConditionalGeneration",
        "idefics3",
        {"model_type": "llama"},
        {"vision_config": _TOWER},
        {"image_token_id": 250, "scale_factor": 2},
    ),
    "internvl": Wrapper(
        "InternVLForConditionalGeneration",
        "internvl",
        {"model_type": "qwen2"},
        {"vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]}},
        {"image_token_id": 250},
    ),
}


# Built where timm is there alone.
WITH_TIMM = replace(
    WRAPPERS["gemma3n"],
    towers={
        **WRAPPERS["gemma3n"].towers,
        "vision_config": {
            "architecture": "test_convnext",
            "hidden_size": 64,
            "vocab_size": 8,
            "vocab_offset": 260,
        },
    },
)


LENDING = ("gemma3n", "gemma4")


def whole(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The model ``name`` with its towers, as transformers makes it."""
    row = WITH_TIMM if name == "gemma3n-timm" else WRAPPERS[name]
    torch.manual_seed(seed)
    # Which Gemma 3n has its vision tower of: a small one of its tests, or none.
    with without_timm(but_its_own=name.endswith("-timm")):
        model = getattr(transformers, row.architecture)._from_config(row.config(), dtype=torch.float32)
    scale_up(model)
    with torch.no_grad():
        for weight in model.parameters():
            if (
                weight.ndim == 2 and not weight.any()
            ):  # as a new projector of Gemma 3, by which no image says anything
                weight.normal_(std=0.2)
    # Not the complex numbers of Llama 4's rotary embedding.
    model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return model.eval().requires_grad_(False)


def build(name: str, target: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save the model ``name`` with its towers and a tokenizer in ``target``."""
    whole(name, seed, dtype).save_pretrained(target)
    save_tokenizer(target)
    return target


@pytest.fixture(scope="session")
def wrapper_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model by its name, made once."""
    root = tmp_path_factory.mktemp("wrappers")
    return cache(lambda name: build(name, root / name))


@pytest.fixture(scope="session")
def wrapper(wrapper_folder: Callable[[str], Path]) -> Callable[[str], Calibrated]:
    """The language model inside a model by its name, calibrated once."""
    return cache(lambda name: calibrated(wrapper_folder(name)))
