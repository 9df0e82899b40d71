"""Tiny models in which something begins after 100 tokens, beyond any text of every day, and the same without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.tiny_types import scale_up

SWITCH, VOCAB = 100, 260
_COMMON = {
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
    common: Mapping[str, Any] = field(default_factory=lambda: _COMMON)
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
