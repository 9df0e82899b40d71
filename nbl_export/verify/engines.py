"""Run the built engines: parity against PyTorch and speed against everything else on the same GPU.

Without a GPU nothing is run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.checks import Check
from nbl_export.engine.gpu import Gpu, find_gpu
from nbl_export.engine.pair import EngineFile
from nbl_export.engine.profiles import Limits
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.precision import Precision, precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.load import in_precision
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import torch_stream
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.measurement import Found
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import EngineParity, Parity, gates_for
from nbl_export.verify.parity.own import OWN, pytorch_in_precision
from nbl_export.verify.speed.candidates import (
    CUDA,
    TIMED_STEPS,
    Contender,
    EngineContender,
    Entrant,
    OrtEntrant,
    TorchContender,
    made,
)
from nbl_export.verify.speed.race import Rounds, race, timed

if TYPE_CHECKING:
    import torch

# Ragged on purpose: the batch must be padded on the left, by different amounts.
PROMPTS = (64, 41, 23)


@dataclass(frozen=True)
class RunningEngines:
    """The engines of a case loaded on ``gpu``, by role."""

    case: DecoderCase
    gpu: Gpu
    streams: Mapping[str, EngineStream]

    @property
    def limits(self) -> Limits:
        return self.case.engines[0].manifest.limits

    @property
    def precision(self) -> Precision:
        return precision_of(self.case.engines[0].manifest.precision)


def measure_engines(
    case: DecoderCase, contexts: Sequence[int]
) -> tuple[Found[None], Found[EngineParity], Found[Mapping[str, Any]]]:
    """What was built, and on a GPU its parity and its speed; without one, a line that says so."""
    built = built_check(case.engines)
    running = _loaded(case)
    if isinstance(running, Check):
        return Found(checks=(built, running)), Found(), Found()
    prompts = _fitting_prompts(running)
    if isinstance(prompts, Check):
        return Found(checks=(built, prompts)), Found(), Found()
    parity = _parity(running, prompts)
    passed = all(check.status != "failed" for check in parity.checks)
    speed = _speed(running, contexts) if case.settings.speed and passed else Found[Mapping[str, Any]]()
    return Found(checks=(built,)), parity, speed


def built_check(engines: Sequence[EngineFile]) -> Check:
    """What was built, as the report's line; the checks behind it were made while building."""
    parts = []
    for engine in engines:
        m = engine.manifest
        count = m.network.attention
        kind = f"{count} {m.attention} attention layers" if count else "no attention"
        parts.append(f"{m.role} {m.size / 2**20:,.1f} MiB with {kind}")
    first = engines[0].manifest
    return Check(
        "engine build",
        "passed",
        f"{first.library} {first.library_version}, {first.precision}: {'; '.join(parts)}",
    )


def not_run(engines: Sequence[EngineFile], why: str) -> Check:
    """The line for engines that were built and not run."""
    manifest = engines[0].manifest
    how = "ahead of time for " if manifest.ahead_of_time else "for "
    return Check(
        "engine run", "skipped", f"engine built ({how}{', '.join(manifest.capabilities)}); not run: {why}"
    )


def _loaded(case: DecoderCase) -> RunningEngines | Check:
    """The engines on this machine's GPU, or why they do not run there."""
    gpu = find_gpu()
    if gpu is None:
        return not_run(case.engines, "no NVIDIA GPU")
    try:
        streams = {e.manifest.role: EngineStream(load_engine(e.path)) for e in case.engines}
    except (MissingDependencyError, InputError) as error:
        return not_run(case.engines, str(error))
    except BuildError as error:
        return Check("engine run", "failed", str(error))
    return RunningEngines(case, gpu, streams)


# parity ------------------------------------------------------------------------------------------


def _fitting_prompts(running: RunningEngines) -> list[int] | Check:
    """How long the prompts are that the engines have room for, or that they have none."""
    case, limits = running.case, running.limits
    steps = case.settings.decode_steps
    longest = min(limits.max_seq, limits.max_context - steps) - len(case.text.start)
    if longest < 1:
        why = (
            f"a context of {limits.max_context} and a prefill of {limits.max_seq} tokens hold no prompt and "
            f"{steps} decode steps"
        )
        return not_run(case.engines, why)
    # Scaled, not cut: the batch stays ragged.
    scale = min(1.0, longest / max(PROMPTS))
    return [max(1, int(p * scale)) for p in PROMPTS[: limits.max_batch]]


def _parity(running: RunningEngines, prompts: Sequence[int]) -> Found[EngineParity]:
    """Each engine against PyTorch with the same plan; the base engine's has no linear layer."""
    plan = running.case.plan
    base, base_check = _parity_of(running, BASE, plan.without_layers(), prompts)
    linear, linear_check = _parity_of(running, LINEARIZED, plan, prompts)
    section = EngineParity(linear, base) if base or linear else None
    return Found(section, (base_check, linear_check))


def _parity_of(
    running: RunningEngines, role: str, plan: Plan, prompts: Sequence[int]
) -> tuple[Parity | None, Check]:
    case, precision = running.case, running.precision
    name = "engine parity" if role == LINEARIZED else f"{role} engine parity"
    rows, steps = case.rows(prompts), case.settings.decode_steps
    try:
        with linearized(case.model, plan):
            reference, gates = torch_stream(case.model, plan.chosen), gates_for(precision.gates)
            parity = compare_streams(reference, running.streams[role], rows, steps, gates, case.listener)
    except BuildError as error:
        return None, Check(name, "failed", str(error))
    failures = parity.failures()
    if precision.name != "fp32":
        failures += parity.failures_against(
            pytorch_in_precision(precision, case.model, plan, rows, steps), OWN
        )
    detail = f"max |Δlogit| {parity.worst:.2g} on {running.gpu.name}, within all {precision.gates} gates"
    return parity, Check(name, "failed" if failures else "passed", "; ".join(failures) or detail)


# speed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one contender at one context: median and 99th percentile."""

    name: str
    context: int
    prefill_ms: float
    prefill_p99_ms: float
    decode_ms: float
    decode_p99_ms: float
    tokens_per_second: float
    memory_bytes: int


def laps(contender: Contender) -> tuple[float, list[float]]:
    """Seconds of a prefill, and of each step after it, on their own for the 99th percentile."""
    return timed(contender.prefill), [timed(contender.step) for _ in range(TIMED_STEPS)]


def _latency(name: str, context: int, runs: list[tuple[float, list[float]]], memory: int) -> Latency:
    times = [first for first, _ in runs], [step for _, steps in runs for step in steps]
    (p50, p99), (d50, d99) = (np.quantile(t, (0.5, 0.99)) * 1e3 for t in times)
    return Latency(name, context, float(p50), float(p99), float(d50), float(d99), 1e3 / float(d50), memory)


def gpu_entrants(
    model: torch.nn.Module,
    streams: Mapping[str, EngineStream],
    graphs: Mapping[str, Path],
    precision: str,
) -> dict[str, Entrant]:
    """Who takes part on a GPU: both engines, both graphs in ONNX Runtime's CUDA provider, eager PyTorch.

    PyTorch's copy of the model is made in the engines' precision when it is first asked for.
    """
    made: dict[str, torch.nn.Module] = {}

    def eager(context: int, batch: int = 1) -> Contender:
        if "base" not in made:
            made["base"] = in_precision(model, precision_of(precision).gates).to("cuda")
        return TorchContender(made["base"], context, batch)

    entrants: dict[str, Entrant] = {}
    for role, stream in streams.items():
        entrants[f"{role} engine"] = partial(EngineContender, stream)
    for role, path in graphs.items():
        entrants[f"onnxruntime CUDA, {role}"] = OrtEntrant(path, CUDA)
    entrants["PyTorch eager, base"] = eager
    return entrants


@dataclass(frozen=True)
class EngineSpeed:
    """All latencies, base/linearized ratios of the engines, and who could not take part and why."""

    gpu: str
    compute_capability: str
    rounds: int
    latencies: tuple[Latency, ...]
    speedups: tuple[dict[str, float], ...]
    absent: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def speedups(latencies: Sequence[Latency], base: str, linearized: str) -> tuple[dict[str, float], ...]:
    """base/linearized of the medians, for each context."""
    named = {(x.name, x.context): x for x in latencies}
    return tuple(
        {
            "context": float(context),
            "prefill": named[base, context].prefill_ms / named[linearized, context].prefill_ms,
            "decode": named[base, context].decode_ms / named[linearized, context].decode_ms,
        }
        for context in sorted({x.context for x in latencies})
        if (base, context) in named and (linearized, context) in named
    )


def measure_engine_speed(
    gpu: Gpu,
    entrants: Mapping[str, Entrant],
    contexts: Sequence[int],
    rounds: int,
    listener: Listener | None = None,
) -> EngineSpeed:
    """Race the ``entrants`` at each context length.

    One that cannot be made or run (no CUDA provider, no room) is left out, with its reason.
    """
    latencies: list[Latency] = []
    absent: dict[str, str] = {}
    with (listener or Silent()).task("Timing on the GPU", len(contexts) * (rounds + 1), "rounds") as task:
        for context in contexts:
            contenders = made(entrants, context, 1, absent)
            runs = race(contenders, laps, Rounds(rounds, rounds), task.advance, absent=absent)
            latencies += [
                _latency(name, context, found, contenders[name].memory_bytes())
                for name, found in runs.items()
            ]
    return EngineSpeed(
        gpu.name,
        gpu.compute_capability,
        rounds,
        tuple(latencies),
        speedups(latencies, "base engine", "linearized engine"),
        absent,
    )


def _speed(running: RunningEngines, contexts: Sequence[int]) -> Found[Mapping[str, Any]]:
    """Everything that runs on the GPU, timed at those of ``contexts`` that the engines hold."""
    case, limits = running.case, running.limits
    longest = min(limits.max_seq, limits.max_context - TIMED_STEPS)
    fitting = [c for c in contexts if c <= longest] or [longest] * (longest > 0)
    notes = []
    if dropped := sorted(set(contexts) - set(fitting)):
        notes.append(
            f"The engines are not timed at {', '.join(map(str, dropped))} tokens: they are built for a prefill of "
            f"{limits.max_seq:,} and a context of {limits.max_context:,}."
        )
    entrants = gpu_entrants(case.model, running.streams, case.graphs, running.precision.name)
    speed = measure_engine_speed(running.gpu, entrants, fitting, case.settings.rounds, case.listener)
    notes += [f"Not timed on the GPU: {name}: {why}." for name, why in speed.absent.items()]
    return Found(speed.as_json() if speed.latencies else None, notes=tuple(notes))
