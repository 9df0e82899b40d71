"""Tiny models of many families, and where their modules are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

COUNT, D = 3, 16


COMMON = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}


SIZES = {**COMMON, "hidden_size": D, "num_hidden_layers": COUNT, "num_attention_heads": 4}


@dataclass(frozen=True)
class Family:
    """A family's classes and tiny sizes, and where its modules are, by a reading of its source."""

    name: str
    fields: dict[str, Any]
    attention: str
    norm: str
    output: str


FAMILIES = {
    "llama": Family(
        "Llama", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 32},
        "model.layers.{}.self_attn", "model.layers.{}.input_layernorm", "o_proj",
    ),
    "qwen3": Family(
        "Qwen3", {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32},
        "model.layers.{}.self_attn", "model.layers.{}.input_layernorm", "o_proj",
    ),
    "gpt2": Family(
        "GPT2", {**COMMON, "n_embd": D, "n_layer": COUNT, "n_head": 4, "n_positions": 32},
        "transformer.h.{}.attn", "transformer.h.{}.ln_1", "c_proj",
    ),
    "gpt_neox": Family(
        "GPTNeoX", {**SIZES, "intermediate_size": 32},
        "gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.input_layernorm", "dense",
    ),
    "phi": Family(
        "Phi", {**SIZES, "intermediate_size": 32},
        "model.layers.{}.self_attn", "model.layers.{}.input_layernorm", "dense",
    ),
    "opt": Family(
        "OPT", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": D, "max_position_embeddings": 32},
        "model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn_layer_norm", "out_proj",
    ),
}  # fmt: skip


def build(name: str, kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    return getattr(transformers, f"{name}{kind}")(config).eval()
