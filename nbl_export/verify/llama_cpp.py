"""What a GGUF file is in llama.cpp beside its logits: the same tokens, and a cache of the attention layers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.checks import Check
from nbl_export.runtime.llama_cpp import LlamaCppStream
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.converted import TOKENS, check_tokens


def check_gguf(case: DecoderCase, path: Path, tokenizer: Any) -> tuple[Check, ...]:
    """The checks of the file at ``path`` against the model and its ``tokenizer``."""
    with LlamaCppStream(path, 1, TOKENS, fused=True) as stream:
        return check_tokens(case, tokenizer, stream.tokenize, "llama.cpp"), _cache_check(case, stream)


def _cache_check(case: DecoderCase, stream: LlamaCppStream) -> Check:
    """Whether the KV cache is that of the attention layers alone."""
    config: Any = case.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = len(case.plan.attention_layers)
    expected = layers * 2 * config.num_key_value_heads * head * 4 * stream.slots
    off = abs(stream.cache_bytes - expected)
    # The library says it in hundredths of a MiB.
    if off <= 0.01 * 2**20:
        return Check("KV cache", "passed", f"keys and values of {layers} layers alone")
    return Check(
        "KV cache", "failed", f"{stream.cache_bytes:,} bytes for {layers} layers, which take {expected:,}"
    )
