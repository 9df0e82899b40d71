"""Measure what other engines run: TensorRT engines, and the forms of a plan for llama.cpp, MLX and others.

A TensorRT engine is compared with PyTorch and timed against everything else on the same GPU. Without one nothing is
run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from nbl_export.batch import words
from nbl_export.engine.library import Gpu, find_gpu
from nbl_export.engine.manifest import EngineFile
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.precision import QUANTIZED, precision_of
from nbl_export.models.weights import in_precision
from nbl_export.records import Check
from nbl_export.runtime.clients import LlamaCppStream
from nbl_export.runtime.session import CUDA
from nbl_export.runtime.stream import Stream
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.verify.case import DecoderCase, Measurement, parity_text, scaled_prompts, text_of
from nbl_export.verify.parity.compare import Recorded, record, stepped
from nbl_export.verify.parity.figures import EngineParity, Parity
from nbl_export.verify.parity.pytorch import Reference
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    Candidate,
    Prompt,
    StreamPrompt,
)
from nbl_export.verify.speed.pair import TorchPrompt, graph_candidate
from nbl_export.verify.speed.race import MORE, Harness, Rounds
from nbl_export.verify.speed.values import Machine, Speed
from nbl_export.workspace import BASE, LINEARIZED

BASE_ENGINE, LINEARIZED_ENGINE = f"{BASE} engine", f"{LINEARIZED} engine"


def measure_engines(case: DecoderCase, contexts: Sequence[int], found: Measurement) -> None:
    """What was built, and on a GPU its parity and its speed; without one, a line that says so."""
    if not case.engines:
        if case.passed_over:
            found.check("engine run", "skipped", case.passed_over)
        return None
    found.checks.append(built_check(case.engines))
    first = case.engines[0].manifest

    def not_run(why: str) -> None:
        how = "ahead of time for " if first.ahead_of_time else "for "
        built = f"engine built ({how}{', '.join(first.capabilities)})"
        found.check("engine run", "skipped", f"{built}; not run: {why}")

    if (gpu := find_gpu()) is None:
        return not_run("no NVIDIA GPU")
    try:
        streams = {e.manifest.role: load_engine(e.path) for e in case.engines}
    except (MissingDependencyError, InputError) as error:
        return not_run(str(error))
    except BuildError as error:
        return found.check("engine run", "failed", str(error))
    limits, steps, precision = first.limits, case.settings.decode_steps, precision_of(first.precision)
    longest = min(limits.max_seq, limits.max_context - steps) - len(case.text.start)
    if longest < 1:
        short = f"a context of {limits.max_context} and a prefill of {limits.max_seq} tokens"
        return not_run(f"{short} hold no prompt and {steps} decode steps")
    prompts = scaled_prompts(longest)[: limits.max_batch]
    text, _ = text_of(case, prompts, fits=lambda p: p <= limits.max_seq and p + steps <= limits.max_context)
    parities: dict[str, Parity] = {}
    passed = True
    # Each engine against PyTorch with the same plan; the base engine's has no linear layer.
    for role, plan in ((BASE, case.plan.without_layers()), (LINEARIZED, case.plan)):
        name, stream = f"{BASE} engine parity" if role == BASE else "engine parity", streams[role]
        with found.clock():
            reference = Reference(case.model, plan, text, precision)
            try:
                judged = reference.judge(record(stepped(stream, text), stream.kv_layers, text, case.listener))
            except BuildError as error:
                found.check(name, "failed", str(error))
                passed = False
                continue
            parities[role], passed = judged.parity, passed and not judged.failures
            within = (
                f"max |Δlogit| {judged.parity.worst:.2g} on {gpu.name}, within all {precision.gates} gates"
            )
            found.judge(name, judged.failures, within)
    found.engine_parity = EngineParity(parities.get(LINEARIZED), parities.get(BASE)) if parities else None
    if case.settings.speed and passed:
        found.engine_speed = _engine_speed(case, gpu, streams, contexts, found)
    return None


def built_check(engines: Sequence[EngineFile]) -> Check:
    """What was built, as the report's line; the checks behind it were made while building."""
    parts = []
    for engine in engines:
        m = engine.manifest
        count = m.network.attention
        none = "decomposed attention" if m.kv_layers else "no attention"
        kind = f"{count} {m.attention} attention layers" if count else none
        parts.append(f"{m.role} {m.size / 2**20:,.1f} MiB with {kind}")
    first = engines[0].manifest
    said = f"{first.library} {first.library_version}, {first.precision}: {'; '.join(parts)}"
    return Check("engine build", "passed", said, sum(engine.manifest.build_seconds for engine in engines))


def _engine_speed(
    case: DecoderCase,
    gpu: Gpu,
    streams: dict[str, EngineStream],
    contexts: Sequence[int],
    found: Measurement,
) -> Speed | None:
    """Everything that runs on the GPU, timed at those of ``contexts`` that the engines hold.

    Both engines, both graphs in ONNX Runtime's CUDA provider, eager PyTorch, with the 99th percentile of single
    prefills and steps. One that cannot be made or run (no CUDA provider, no room) is left out, with its reason.
    """
    first = case.engines[0].manifest
    limits, rounds = first.limits, case.settings.rounds
    longest = min(limits.max_seq, limits.max_context - TIMED_STEPS)
    fitting = [c for c in contexts if c <= longest] or [longest] * (longest > 0)
    if dropped := sorted(set(contexts) - set(fitting)):
        found.notes.append(
            f"The engines are not timed at {', '.join(map(str, dropped))} tokens: they are built for a prefill of "
            f"{limits.max_seq:,} and a context of {limits.max_context:,}."
        )

    @cache  # in the engines' precision, made when it is first asked for
    def copied() -> torch.nn.Module:
        return in_precision(case.model, precision_of(first.precision).gates, "cuda")

    def eager(context: int, batch: int) -> Prompt:
        return TorchPrompt(copied(), context, batch)

    candidates = []
    for role, stream in streams.items():
        own = BASE_ENGINE if role == LINEARIZED else None
        candidates.append(Candidate(f"{role} engine", partial(StreamPrompt, stream), own))
    for role, path in ((BASE, case.baseline), (LINEARIZED, case.rewritten)):
        own = f"onnxruntime CUDA, {BASE}" if role == LINEARIZED else None
        if path:
            graph = graph_candidate(f"onnxruntime CUDA, {role}", path, own, CUDA)
            candidates.append(replace(graph, cost=None))
    harness = Harness(
        [*candidates, Candidate(f"PyTorch eager, {BASE}", eager)],
        Machine(gpu.name, compute_capability=gpu.compute_capability),
        Rounds(rounds, MORE * rounds),
        linearized=LINEARIZED_ENGINE,
        steps=TIMED_STEPS - 1,  # the first is not counted
        percentile=True,
    )
    speed = harness.measure([(1, context) for context in fitting], case.listener)
    found.notes += [f"Not timed on the GPU: {name}: {why}." for name, why in speed.absent()]
    return speed if any(cell.results for cell in speed.cells) else None


# forms ---------------------------------------------------------------------------------------------


# A file of 8 or 4 bits is held to the gates of a graph of as many; the others to those of their dtype.
_QUANTIZED = {"q8_0": QUANTIZED["int8"], "q4_k_m": QUANTIZED["int4"]}
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
    text, _ = parity_text(case, cached=True)
    longest = max(len(row) for batch in text.batches for row in batch)

    def recorded(form: Path) -> Recorded:
        with opened(form, len(text.rows), longest) as stream:
            return record(stepped(stream, text), stream.kv_layers, text, case.listener)

    held = _QUANTIZED.get(precision) or precision_of(precision)
    reference = Reference(case.model, case.plan, text, held, case.listener)
    judged = reference.judge(recorded(path), lambda: recorded(unmodified()))
    run, found = f"a prefill and {text.steps} decode steps in {engine}", Measurement()
    within = f"max |Δlogit| {judged.parity.worst:.2g} over {run}, within all {held.gates} gates"
    found.judge("parity", judged.failures, within)
    return found.checks[0], judged.parity


def check_tokens(
    case: DecoderCase, tokenizer: Any, tokenize: Callable[[str], list[int]], engine: str
) -> Check:
    """Whether an ``engine`` makes the tokens of held-out text that the model's own tokenizer makes."""
    tokens = words(case.text.heldout).reshape(-1)[:TOKENS]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    own, found = list(tokenizer(text).input_ids), tokenize(text)
    if own == found:
        said = f"{len(own)} tokens of held-out text are those of the model's tokenizer"
        return Check("tokens", "passed", said)
    shorter = min(len(own), len(found))
    at = next((n for n in range(shorter) if own[n] != found[n]), shorter)
    where = tokenizer.decode(own[max(0, at - 3) : at + 3])
    return Check(
        "tokens",
        "failed",
        f"token {at} of held-out text is {found[at : at + 1] or 'missing'} in {engine} and {own[at : at + 1]} in the "
        f"model's tokenizer, in {where!r}: give {engine} token ids",
    )


def check_gguf(case: DecoderCase, path: Path, tokenizer: Any) -> tuple[Check, ...]:
    """What a GGUF file is in llama.cpp beside its logits: the same tokens, a cache of the attention layers alone."""
    config: Any = case.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = len(case.plan.attention_layers)
    with LlamaCppStream(path, 1, TOKENS, fused=True) as stream:
        tokens = check_tokens(case, tokenizer, stream.tokenize, "llama.cpp")
        expected = layers * 2 * config.num_key_value_heads * head * 4 * stream.slots
        found = stream.memory_bytes
    # The library says it in hundredths of a MiB.
    if abs(found - expected) <= 0.01 * 2**20:
        return tokens, Check("KV cache", "passed", f"keys and values of {layers} layers alone")
    said = f"{found:,} bytes for {layers} layers, which take {expected:,}"
    return tokens, Check("KV cache", "failed", said)
