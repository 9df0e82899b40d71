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

from nbl_export.checks import Check
from nbl_export.engine.gpu import Gpu
from nbl_export.engine.pair import EngineFile
from nbl_export.graph.precision import precision_of
from nbl_export.models.load import in_precision
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.tensorrt import EngineStream
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


def built_check(engines: Sequence[EngineFile]) -> Check:
    """What was built, as the report's line; the checks behind it were made while building."""
    parts = []
    for engine in engines:
        m = engine.manifest
        count = m.network["attention"]
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
