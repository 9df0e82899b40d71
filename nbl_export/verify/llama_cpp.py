"""A GGUF file in llama.cpp against PyTorch with the same plan: logits, tokens, and the size of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.media_ids import words
from nbl_export.checks import Check
from nbl_export.graph.precision import precision_of
from nbl_export.runtime.llama_cpp import LlamaCppStream
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.crossing import parity_text
from nbl_export.verify.measurement import judged
from nbl_export.verify.parity.decoder import Recorded, compare, record
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.own import OWN, pytorch_in_precision
from nbl_export.verify.parity.reference import record_pytorch

# The gates of each precision: those of a graph with weights of as many bits.
_GATES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "q8_0": "int8"}
# Tokens of held-out text that are made text and tokens again.
_TOKENS = 512
Rows = Sequence[NDArray[np.int32]]


def measure_gguf(
    case: DecoderCase, path: Path, precision: str, tokenizer: Any, unmodified: Callable[[], Path]
) -> tuple[tuple[Check, ...], Parity]:
    """The checks of the file at ``path``, and the figures of its parity.

    ``unmodified`` writes the model without linear layers in the same format: a quantized file is held to what
    quantization costs that one.
    """
    steps = case.settings.decode_steps
    rows, alone, _ = parity_text(case, cached=True)
    gates = gates_for(_GATES[precision])
    reference = record_pytorch(case.model, case.plan, rows, steps, True, alone)
    parity = compare(reference, _recorded(path, rows, steps, alone), gates)
    failures = parity.failures()
    if precision == "q8_0":
        original = record_pytorch(case.model, None, rows, steps, True, alone)
        base = compare(original, _recorded(unmodified(), rows, steps, alone), gates)
        failures += parity.failures_against(base, "the unmodified file's own")
    elif precision != "fp32":
        half = precision_of(precision)
        own = pytorch_in_precision(half, case.model, case.plan, rows, steps, True, reference, alone)
        failures += parity.failures_against(own, OWN)
    within = (
        f"max |Δlogit| {parity.worst:.2g} over a prefill and {steps} decode steps in llama.cpp, within all "
        f"{_GATES[precision]} gates"
    )
    found = judged(parity, failures, within, lambda: None)
    with LlamaCppStream(path, 1, _TOKENS, fused=True) as stream:
        return (*found.checks, _tokens_check(case, stream, tokenizer), _cache_check(case, stream)), parity


def _recorded(path: Path, rows: Rows, steps: int, alone: Rows) -> Recorded:
    longest = max(len(row) for row in (*rows, *alone))
    with LlamaCppStream(path, len(rows), longest) as stream:
        return record(stream, rows, steps, alone=alone)


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
