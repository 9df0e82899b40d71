"""Judge the form of another engine, run there, against PyTorch with the same plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nbl_export.batch.arrays import words
from nbl_export.graph.precision import precision_of
from nbl_export.records import Check
from nbl_export.runtime.stream import Stream
from nbl_export.verify.case import DecoderCase, parity_text
from nbl_export.verify.parity.decoder import Recorded, compare, record
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.pytorch import OWN, pytorch_in_precision, record_pytorch

# A file of 8 or 4 bits is held to the gates of a graph of as many; the others to those of their dtype.
_QUANTIZED = {"q8_0": "int8", "q4_k_m": "int4"}
# Tokens of held-out text that are made text and tokens again.
TOKENS = 512
# What runs a form: for so many rows, each of at most so many tokens.
Opened = Callable[[Path, int, int], AbstractContextManager[Stream]]


def measure_converted(
    case: DecoderCase, path: Path, precision: str, engine: str, opened: Opened, unmodified: Callable[[], Path]
) -> tuple[Check, Parity]:
    """The check of the form at ``path`` in its ``engine``, and the figures of its parity.

    ``unmodified`` writes the model without linear layers in the same form: a quantized one is held to what
    quantization costs that one.
    """
    steps = case.settings.decode_steps
    rows, alone, _ = parity_text(case, cached=True)
    longest = max(len(row) for row in (*rows, *alone))

    def recorded(form: Path) -> Recorded:
        with opened(form, len(rows), longest) as stream:
            return record(stream, rows, steps, case.listener, alone)

    dtype = _QUANTIZED.get(precision) or precision_of(precision).gates
    gates = gates_for(dtype)
    reference = record_pytorch(case.model, case.plan, rows, steps, True, alone, listener=case.listener)
    parity = compare(reference, recorded(path), gates)
    failures = parity.failures()
    if precision in _QUANTIZED:
        original = record_pytorch(case.model, None, rows, steps, True, alone, listener=case.listener)
        failures += parity.failures_against(
            compare(original, recorded(unmodified()), gates), "the unmodified file's own"
        )
    elif precision != "fp32":
        own = pytorch_in_precision(
            precision_of(precision),
            case.model,
            case.plan,
            rows,
            steps,
            True,
            reference,
            alone,
            listener=case.listener,
        )
        failures += parity.failures_against(own, OWN)
    within = (
        f"max |Δlogit| {parity.worst:.2g} over a prefill and {steps} decode steps in {engine}, within all "
        f"{dtype} gates"
    )
    return Check("parity", "failed" if failures else "passed", "; ".join(failures) or within), parity


def check_tokens(
    case: DecoderCase, tokenizer: Any, tokenize: Callable[[str], list[int]], engine: str
) -> Check:
    """Whether an ``engine`` makes the tokens of held-out text that the model's own tokenizer makes."""
    tokens = words(case.text.heldout).reshape(-1)[:TOKENS]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    own, found = list(tokenizer(text).input_ids), tokenize(text)
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
        f"token {at} of held-out text is {found[at : at + 1] or 'missing'} in {engine} and {own[at : at + 1]} in the "
        f"model's tokenizer, in {where!r}: give {engine} token ids",
    )


def check_gguf(case: DecoderCase, path: Path, tokenizer: Any) -> tuple[Check, ...]:
    """What a GGUF file is in llama.cpp beside its logits: the same tokens, a cache of the attention layers alone."""
    from nbl_export.runtime.llama_cpp import LlamaCppStream

    config: Any = case.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = len(case.plan.attention_layers)
    with LlamaCppStream(path, 1, TOKENS, fused=True) as stream:
        tokens = check_tokens(case, tokenizer, stream.tokenize, "llama.cpp")
        expected = layers * 2 * config.num_key_value_heads * head * 4 * stream.slots
        found = stream.cache_bytes
    # The library says it in hundredths of a MiB.
    if abs(found - expected) <= 0.01 * 2**20:
        return tokens, Check("KV cache", "passed", f"keys and values of {layers} layers alone")
    return tokens, Check(
        "KV cache", "failed", f"{found:,} bytes for {layers} layers, which take {expected:,}"
    )
