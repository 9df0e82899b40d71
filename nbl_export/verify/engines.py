"""Measure what other engines run: TensorRT engines, and the forms of a plan for llama.cpp, MLX and others.

A TensorRT engine is compared with PyTorch and timed against everything else on the same GPU. Without one nothing is
run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.engine.build import EngineFile
from nbl_export.engine.library import Gpu, find_gpu
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.precision import Precision, precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.models.lengths import crossed_by, crossing_prompts
from nbl_export.models.weights import in_precision
from nbl_export.records import Check
from nbl_export.runtime.session import CUDA
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.verify.case import DecoderCase, Measurement, scaled_prompts
from nbl_export.verify.parity.compare import Rows, compare, record
from nbl_export.verify.parity.figures import EngineParity, Parity, gates_for
from nbl_export.verify.parity.pytorch import OWN, pytorch_in_precision, record_pytorch
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    Candidate,
    Prompt,
    StreamPrompt,
    TorchPrompt,
    graph_candidate,
)
from nbl_export.verify.speed.race import MORE, Harness, Rounds
from nbl_export.verify.speed.values import Machine, Speed

if TYPE_CHECKING:
    import torch
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nbl_export.batch.arrays import words
from nbl_export.runtime.stream import Stream
from nbl_export.verify.case import parity_text
from nbl_export.verify.parity.compare import Recorded

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
        streams = {e.manifest.role: EngineStream(load_engine(e.path)) for e in case.engines}
    except (MissingDependencyError, InputError) as error:
        return not_run(str(error))
    except BuildError as error:
        return found.check("engine run", "failed", str(error))
    limits, steps = first.limits, case.settings.decode_steps
    longest = min(limits.max_seq, limits.max_context - steps) - len(case.text.start)
    if longest < 1:
        short = f"a context of {limits.max_context} and a prefill of {limits.max_seq} tokens"
        return not_run(f"{short} hold no prompt and {steps} decode steps")
    running, passed = _Running(case, gpu, precision_of(first.precision)), len(found.checks)
    rows = running.rows(scaled_prompts(longest)[: limits.max_batch])
    # Each engine against PyTorch with the same plan; the base engine's has no linear layer.
    base = running.parity(f"{BASE} engine parity", streams[BASE], case.plan.without_layers(), rows, found)
    linear = running.parity("engine parity", streams[LINEARIZED], case.plan, rows, found)
    found.engine_parity = EngineParity(linear, base) if base or linear else None
    if case.settings.speed and all(check.status != "failed" for check in found.checks[passed:]):
        found.engine_speed = running.speed(streams, contexts, found)
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


@dataclass(frozen=True)
class _Running:
    """The engines of a case on ``gpu``, in one ``precision``."""

    case: DecoderCase
    gpu: Gpu
    precision: Precision

    def rows(self, prompts: Sequence[int]) -> tuple[Rows, Rows]:
        """The ragged rows, and those of one batch each that cross the model's lengths and fit into the engines."""
        case, limits = self.case, self.case.engines[0].manifest.limits
        steps, start = case.settings.decode_steps, len(case.text.start)
        crossing = crossing_prompts(crossed_by(case.model, steps, [start + prompt for prompt in prompts]))
        alone = [p for p in crossing if p <= limits.max_seq and p + steps <= limits.max_context]
        rows = case.rows([*prompts, *(max(1, prompt - start) for prompt in alone)])
        return rows[: len(prompts)], rows[len(prompts) :]

    def parity(
        self, name: str, engine: EngineStream, plan: Plan, text: tuple[Rows, Rows], found: Measurement
    ) -> Parity | None:
        """The engine against PyTorch with ``plan``, and its verdict."""
        case, precision, (rows, alone) = self.case, self.precision, text
        model, steps, gates = case.model, case.settings.decode_steps, gates_for(precision.gates)
        with found.clock():
            reference = record_pytorch(model, plan, rows, steps, alone=alone)
            try:
                recorded = record(engine, rows, steps, case.listener, alone)
            except BuildError as error:
                found.check(name, "failed", str(error))
                return None
            parity = compare(reference, recorded, gates)
            failures = parity.failures()
            if precision.name != "fp32":
                own = pytorch_in_precision(precision, model, plan, rows, steps, exact=reference, alone=alone)
                failures += parity.failures_against(own, OWN)
            within = f"max |Δlogit| {parity.worst:.2g} on {self.gpu.name}, within all {precision.gates} gates"
            found.check(name, "failed" if failures else "passed", "; ".join(failures) or within)
        return parity

    def speed(
        self, streams: dict[str, EngineStream], contexts: Sequence[int], found: Measurement
    ) -> Speed | None:
        """Everything that runs on the GPU, timed at those of ``contexts`` that the engines hold.

        Both engines, both graphs in ONNX Runtime's CUDA provider, eager PyTorch, with the 99th percentile of single
        prefills and steps. One that cannot be made or run (no CUDA provider, no room) is left out, with its reason.
        """
        case, limits = self.case, self.case.engines[0].manifest.limits
        longest = min(limits.max_seq, limits.max_context - TIMED_STEPS)
        fitting = [c for c in contexts if c <= longest] or [longest] * (longest > 0)
        if dropped := sorted(set(contexts) - set(fitting)):
            found.notes.append(
                f"The engines are not timed at {', '.join(map(str, dropped))} tokens: they are built for a prefill of "
                f"{limits.max_seq:,} and a context of {limits.max_context:,}."
            )

        @cache  # in the engines' precision, made when it is first asked for
        def copied() -> torch.nn.Module:
            return in_precision(case.model, self.precision.gates, "cuda")

        def eager(context: int, batch: int) -> Prompt:
            return TorchPrompt(copied(), context, batch)

        def own(role: str, name: str) -> str | None:
            return name.format(BASE) if role == LINEARIZED else None

        engine, graph = "{} engine", "onnxruntime CUDA, {}"
        harness = Harness(
            [
                *(
                    Candidate(engine.format(role), partial(StreamPrompt, stream), own(role, engine))
                    for role, stream in streams.items()
                ),
                *(
                    replace(graph_candidate(graph.format(role), path, own(role, graph), CUDA), cost=None)
                    for role, path in case.graphs.items()
                ),
                Candidate(f"PyTorch eager, {BASE}", eager),
            ],
            Machine(self.gpu.name, compute_capability=self.gpu.compute_capability),
            Rounds(case.settings.rounds, MORE * case.settings.rounds),
            linearized=LINEARIZED_ENGINE,
            steps=TIMED_STEPS - 1,  # the first is not counted
            percentile=True,
        )
        speed = harness.measure([(1, context) for context in fitting], case.listener)
        found.notes += [f"Not timed on the GPU: {name}: {why}." for name, why in speed.absent()]
        return speed if any(cell.results for cell in speed.cells) else None


# forms ---------------------------------------------------------------------------------------------


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

    def by_pytorch(plan: Plan | None) -> Recorded:
        return record_pytorch(case.model, plan, rows, steps, alone=alone, listener=case.listener)

    dtype = _QUANTIZED.get(precision) or precision_of(precision).gates
    gates, reference = gates_for(dtype), by_pytorch(case.plan)
    parity = compare(reference, recorded(path), gates)
    failures = parity.failures()
    if precision in _QUANTIZED:
        base = compare(by_pytorch(None), recorded(unmodified()), gates)
        failures += parity.failures_against(base, "the unmodified file's own")
    elif precision != "fp32":
        own, model = precision_of(precision), case.model
        half = pytorch_in_precision(
            own, model, case.plan, rows, steps, exact=reference, alone=alone, listener=case.listener
        )
        failures += parity.failures_against(half, OWN)
    run = f"a prefill and {steps} decode steps in {engine}"
    within = f"max |Δlogit| {parity.worst:.2g} over {run}, within all {dtype} gates"
    return Check("parity", "failed" if failures else "passed", "; ".join(failures) or within), parity


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
    from nbl_export.runtime.clients import LlamaCppStream

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
