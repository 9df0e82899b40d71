"""What a GGUF file is in llama.cpp beside its logits: the same tokens, and a cache of the attention layers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.batch.media_ids import words
from nbl_export.checks import Check
from nbl_export.runtime.llama_cpp import LlamaCppStream
from nbl_export.verify.case import DecoderCase

# Tokens of held-out text that are made text and tokens again.
_TOKENS = 512


def check_gguf(case: DecoderCase, path: Path, tokenizer: Any) -> tuple[Check, ...]:
    """The checks of the file at ``path`` against the model and its ``tokenizer``."""
    with LlamaCppStream(path, 1, _TOKENS, fused=True) as stream:
        return _tokens_check(case, stream, tokenizer), _cache_check(case, stream)


def _tokens_check(case: DecoderCase, stream: LlamaCppStream, tokenizer: Any) -> Check:
    """Whether llama.cpp makes the tokens of held-out text that the model's own tokenizer makes."""
    tokens = words(case.text.heldout).reshape(-1)[:_TOKENS]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    own, found = list(tokenizer(text).input_ids), stream.tokenize(text)
    if own == found:
        return Check(
            "tokens", "passed", f"{len(own)} tokens of held-out text are those of the model's tokenizer"
        )
    at = next(
        (n for n, (a, b) in enumerate(zip(own, found, strict=False)) if a != b), min(len(own), len(found))
    )
    where = tokenizer.decode(own[max(0, at - 3) : at + 3])
    return Check(
        "tokens",
        "failed",
        f"token {at} of held-out text is {found[at : at + 1] or 'missing'} in llama.cpp and {own[at : at + 1]} in the "
        f"model's tokenizer, in {where!r}: give llama.cpp token ids",
    )


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
