"""Tiny random models of any model type of transformers, whose attention matters, or in which something begins late.

It begins after 100 tokens, beyond any text of every day.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
}
_GQA = {"num_key_value_heads": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "llama": _GQA,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "deepseek_v2": _LATENT,  # complex rotary embeddings
    "deepseek_v3": _LATENT,
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention", "moe", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "jamba": {
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_dt_rank": 4,
    },
    "minimax": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "block_size": 90,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "bamba": {
        "num_key_value_heads": 2,
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 90,
    },
    # The scale of its rotary embedding, as of Phi-3.5-MoE, is another beyond 100 tokens.
    "phimoe": {
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "short_mscale": 1.1,
            "long_mscale": 1.6,
            "original_max_position_embeddings": 100,
        },
    },
    "phi3": {
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 100,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 100,
        },
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32},
    },
    "dory": {"num_key_value_heads": 2, "head_dim": 8, "n_input_layers": 1, "n_output_layers": 1},
    "hunyuan_v1_dense": {"num_key_value_heads": 2, "head_dim": 8},
    "doge": {"num_key_value_heads": 2, "keep_window_size": 100},
    # The temperature of the layers without rotary embedding begins at 100 tokens.
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0, 1, 0],
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
        "floor_scale": 100,
        "attn_scale": 1.0,
    },
    "gemma3n_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
    },
}


@torch.no_grad()
def scale_up(model: torch.nn.Module, spread: float = 0.3) -> None:
    """Make attention matter: freshly initialized, it moves a model too little to be missed.

    Biases and norms, which start at zero and one, are moved by ``spread`` at random.
    """
    for path, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.mul_(8 if "attn" in path or "attention" in path else 4)
        else:
            parameter.add_(torch.randn_like(parameter) * spread)


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A model of ``model_type`` in float32; ``changes`` are configuration fields."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **FIELDS.get(model_type, _GQA), **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    scale_up(model)
    return model


@contextmanager
def activations(
    model: Any, norm: str = "model.layers.{}.input_layernorm", out: str = "model.layers.{}.self_attn.o_proj"
) -> Iterator[list[dict[str, list[torch.Tensor]]]]:
    """Within the block, h, x and y of every layer, pass after pass, by hooks where the product never looks."""
    kept: list[dict[str, list[torch.Tensor]]] = []
    hooks = []
    for index in range(model.config.num_hidden_layers):
        found: dict[str, list[torch.Tensor]] = {"h": [], "x": [], "y": []}

        def normed(_m: Any, args: Any, result: torch.Tensor, found: Any = found) -> None:
            found["h"].append(args[0].clone())
            found["x"].append(result.clone())

        def written(_m: Any, _a: Any, result: torch.Tensor, found: Any = found) -> None:
            found["y"].append(result.clone())

        kept.append(found)
        for path, hook in ((norm, normed), (out, written)):
            hooks.append(model.get_submodule(path.format(index)).register_forward_hook(hook))
    try:
        yield kept
    finally:
        for handle in hooks:
            handle.remove()


SWITCH, VOCAB = 100, 260
_LONGER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0, 3.0] * 4,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 5.12,
    "original_max_position_embeddings": SWITCH,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LLAMA4 = {
    "attn_temperature_tuning": False,
    "attention_chunk_size": SWITCH,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_layers": [],
    "no_rope_layers": [1, 0],
}


@dataclass(frozen=True)
class Beyond:
    """A model type whose ``fields`` let something begin at :data:`SWITCH`; with those of ``off`` nothing begins."""

    model_type: str
    fields: Mapping[str, Any]
    off: Mapping[str, Any]
    key: str = "sliding_window"
    common: Mapping[str, Any] = field(default_factory=lambda: _LONGER)
    made: Any = AutoModelForCausalLM

    def model(self, off: bool = False, **changes: Any) -> Any:
        """The model; with ``off`` the same weights without what begins."""
        torch.manual_seed(0)
        fields = {**self.common, **self.fields, **(self.off if off else {}), **changes}
        config = AutoConfig.for_model(self.model_type, **fields)
        model = self.made.from_config(config).float().eval().requires_grad_(False)
        scale_up(model)
        return model


BEYOND = {
    "mistral": Beyond("mistral", {"sliding_window": SWITCH}, {"sliding_window": None}),
    "gemma3": Beyond("gemma3_text", {"sliding_window": SWITCH, **_ALTERNATING}, {"sliding_window": 512}),
    "cohere2": Beyond(
        "cohere2",
        {"sliding_window": SWITCH, "logit_scale": 1.0, **_ALTERNATING},
        {"sliding_window": 512},
    ),
    "phi3": Beyond(
        "phi3",
        {"original_max_position_embeddings": SWITCH, "rope_parameters": _LONG, "sliding_window": None},
        {"rope_parameters": {**_LONG, "long_factor": _LONG["short_factor"]}},
        "original_max_position_embeddings",
    ),
    "ministral3": Beyond(
        "ministral3",
        {"sliding_window": None, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3}},
        {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.0}},
        "original_max_position_embeddings",
    ),
    "llama4": Beyond("llama4_text", _LLAMA4, {"attention_chunk_size": 512}, "attention_chunk_size"),
}

_DISTANCES = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
ENCODERS = {
    # Half of the window lies on either side of a token.
    "modernbert": Beyond(
        "modernbert",
        {"local_attention": 2 * SWITCH, **_ALTERNATING},
        {"local_attention": 600},
        "local_attention",
        made=AutoModel,
    ),
    "gemma3": Beyond(
        "gemma3_text",
        {"sliding_window": SWITCH, "use_bidirectional_attention": True, **_ALTERNATING},
        {"sliding_window": 600},
        made=AutoModel,
    ),
    "deberta": Beyond(
        "deberta-v2",
        {**_DISTANCES, "max_relative_positions": SWITCH},
        {"position_buckets": SWITCH},
        "max_relative_positions",
        made=AutoModel,
    ),
}
