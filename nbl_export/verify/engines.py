"""Run the built engines: parity against PyTorch and speed against everything else on the same GPU.

Without a GPU nothing is run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.checks import Check
from nbl_export.engine.gpu import Gpu
from nbl_export.engine.pair import EngineFile
from nbl_export.graph.precision import precision_of
from nbl_export.models.load import in_precision
from nbl_export.progress import Listener
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.verify.speed.candidates import (
    CUDA,
    TIMED_STEPS,
    Candidate,
    EnginePrompt,
    OrtGraph,
    Prompt,
    TorchPrompt,
)
from nbl_export.verify.speed.harness import Harness
from nbl_export.verify.speed.race import MORE, Rounds
from nbl_export.verify.speed.values import Machine, Speed

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

BASE_ENGINE, LINEARIZED_ENGINE = f"{BASE} engine", f"{LINEARIZED} engine"


@dataclass(frozen=True)
class EngineCase:
    """Engines and graphs by their roles, the model that they were made from, and the GPU that they run on.

    ``limits`` are those that the engines were built for.
    """

    gpu: Gpu
    model: torch.nn.Module
    streams: Mapping[str, EngineStream]
    graphs: Mapping[str, Path]
    precision: str
    limits: Mapping[str, int]


def gpu_candidates(case: EngineCase) -> list[Candidate]:
    """Who takes part on a GPU: both engines, both graphs in ONNX Runtime's CUDA provider, eager PyTorch.

    PyTorch's copy of the model is made in the engines' precision when it is first asked for.
    """
    made: dict[str, torch.nn.Module] = {}

    def eager(context: int, batch: int = 1) -> Prompt:
        if BASE not in made:
            made[BASE] = in_precision(case.model, precision_of(case.precision).gates).to("cuda")
        return TorchPrompt(made[BASE], context, batch)

    def own(role: str, name: str) -> str | None:
        return name.format(BASE) if role == LINEARIZED else None

    engine, cuda = "{} engine", "onnxruntime CUDA, {}"
    engines = [
        Candidate(engine.format(role), partial(EnginePrompt, stream), own(role, engine))
        for role, stream in case.streams.items()
    ]
    graphs = [
        Candidate(cuda.format(role), OrtGraph(path, CUDA), own(role, cuda))
        for role, path in case.graphs.items()
    ]
    return [*engines, *graphs, Candidate(f"PyTorch eager, {BASE}", eager)]


def measure_engine_speed(
    gpu: Gpu,
    candidates: Sequence[Candidate],
    contexts: Sequence[int],
    rounds: int,
    listener: Listener | None = None,
) -> Speed:
    """Race the ``candidates`` at each context length, with the 99th percentile of single prefills and steps.

    One that cannot be made or run (no CUDA provider, no room) is left out, with its reason.
    """
    harness = Harness(
        candidates,
        Machine(gpu.name, compute_capability=gpu.compute_capability),
        Rounds(rounds, MORE * rounds),
        linearized=LINEARIZED_ENGINE,
        steps=TIMED_STEPS - 1,  # the first is not counted
        percentile=True,
    )
    return harness.measure([(1, context) for context in contexts], listener)


def engine_speed(
    case: EngineCase, contexts: Sequence[int], rounds: int, listener: Listener | None = None
) -> tuple[Speed | None, list[str]]:
    """Everything that runs on the GPU, and notes on what was left out; None where nothing was timed."""
    limits, notes = case.limits, []
    longest = min(limits["max_seq"], limits["max_context"] - TIMED_STEPS)
    fitting = [c for c in contexts if c <= longest] or [longest] * (longest > 0)
    if dropped := sorted(set(contexts) - set(fitting)):
        notes.append(
            f"The engines are not timed at {', '.join(map(str, dropped))} tokens: they are built for a prefill of "
            f"{limits['max_seq']:,} and a context of {limits['max_context']:,}."
        )
    speed = measure_engine_speed(case.gpu, gpu_candidates(case), fitting, rounds, listener)
    notes += [f"Not timed on the GPU: {name}: {why}." for name, why in speed.absent()]
    return (speed if any(cell.results for cell in speed.cells) else None), notes
