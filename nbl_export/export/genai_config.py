"""``genai_config.json``: the configuration that onnxruntime-genai needs to generate text with a graph.

It has only keys that onnxruntime-genai knows, since unknown keys are rejected. ``num_hidden_layers`` is the
number of KV pairs, which are numbered contiguously: releases before 0.13 loop over it, later ones read the graph.
"""

from __future__ import annotations

from typing import Any

NAME = "genai_config.json"


def genai_config(
    config: Any, kv_pairs: int, kv_heads: int, head_size: int, shared: bool = False
) -> dict[str, Any]:
    """The configuration for a decoder graph with the standard names and ``kv_pairs`` cached layers.

    ``config`` is the model's (text) configuration; ``shared`` means that past and present may share one buffer.
    """
    end = getattr(config, "eos_token_id", None)
    first_end = end[0] if isinstance(end, list) and end else end
    pad = getattr(config, "pad_token_id", None)
    length = getattr(config, "max_position_embeddings", None) or 2048
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    return {
        "model": {
            "bos_token_id": _token(getattr(config, "bos_token_id", None), first_end),
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": names["key"],
                    "past_value_names": names["value"],
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": kv_pairs,
                "num_key_value_heads": kv_heads,
            },
            "eos_token_id": end if end is not None else 0,
            "pad_token_id": _token(pad, first_end),
            "type": config.model_type,
            "vocab_size": config.vocab_size,
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": shared},
    }


def _token(value: Any, otherwise: Any) -> int:
    return next((int(t) for t in (value, otherwise) if t is not None), 0)
