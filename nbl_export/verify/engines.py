"""Measure the built engines: parity against PyTorch and speed against everything else on the same GPU.

Without a GPU nothing is run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.engine.build import EngineFile
from nbl_export.engine.library import Gpu, find_gpu
from nbl_export.engine.network import Limits
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.precision import Precision, precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.lengths import crossed_by, crossing_prompts
from nbl_export.models.load import in_precision
from nbl_export.progress import Listener
from nbl_export.records import Check, Status
from nbl_export.runtime.session import CUDA
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import torch_stream
from nbl_export.verify.case import DecoderCase, Rows, scaled_prompts
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import EngineParity, Parity, gates_for
from nbl_export.verify.parity.pytorch import OWN, pytorch_in_precision
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    Candidate,
    EnginePrompt,
    OrtGraph,
    Prompt,
    TorchPrompt,
)
from nbl_export.verify.speed.race import MORE, Harness, Rounds
from nbl_export.verify.speed.values import Machine, Speed

if TYPE_CHECKING:
    import torch


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


def measure_engines(case: DecoderCase, contexts: Sequence[int], found: Measurement) -> None:
    """What was built, and on a GPU its parity and its speed; without one, a line that says so."""
    if not case.engines:
        if case.passed_over:
            found.check("engine run", "skipped", case.passed_over)
        return
    found.checks.append(built_check(case.engines))
    gpu = find_gpu()
    if gpu is None:
        found.checks.append(not_run(case.engines, "no NVIDIA GPU"))
        return
    try:
        streams = {e.manifest.role: EngineStream(load_engine(e.path)) for e in case.engines}
    except (MissingDependencyError, InputError) as error:
        found.checks.append(not_run(case.engines, str(error)))
        return
    except BuildError as error:
        found.check("engine run", "failed", str(error))
        return
    running = RunningEngines(case, gpu, streams)
    limits, steps = running.limits, case.settings.decode_steps
    longest = min(limits.max_seq, limits.max_context - steps) - len(case.text.start)
    if longest < 1:
        why = (
            f"a context of {limits.max_context} and a prefill of {limits.max_seq} tokens hold no prompt and "
            f"{steps} decode steps"
        )
        found.checks.append(not_run(case.engines, why))
        return
    prompts, passed = scaled_prompts(longest)[: limits.max_batch], len(found.checks)
    # Each engine against PyTorch with the same plan; the base engine's has no linear layer.
    base = _parity(running, BASE, case.plan.without_layers(), prompts, found)
    linear = _parity(running, LINEARIZED, case.plan, prompts, found)
    found.engine_parity = EngineParity(linear, base) if base or linear else None
    if case.settings.speed and all(check.status != "failed" for check in found.checks[passed:]):
        found.engine_speed = engine_speed(running, contexts, found)


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
    return Check(
        "engine build",
        "passed",
        f"{first.library} {first.library_version}, {first.precision}: {'; '.join(parts)}",
        sum(engine.manifest.build_seconds for engine in engines),
    )


def not_run(engines: Sequence[EngineFile], why: str) -> Check:
    """The line for engines that were built and not run."""
    manifest = engines[0].manifest
    how = "ahead of time for " if manifest.ahead_of_time else "for "
    return Check(
        "engine run", "skipped", f"engine built ({how}{', '.join(manifest.capabilities)}); not run: {why}"
    )


# parity ------------------------------------------------------------------------------------------


def _parity(
    running: RunningEngines, role: str, plan: Plan, prompts: Sequence[int], found: Measurement
) -> Parity | None:
    case, precision = running.case, running.precision
    name, begin = "engine parity" if role == LINEARIZED else f"{role} engine parity", time.perf_counter()
    (rows, alone), steps = _text(running, prompts), case.settings.decode_steps
    try:
        with linearized(case.model, plan):
            reference, gates = torch_stream(case.model, plan.linear_attention), gates_for(precision.gates)
            engine = running.streams[role]
            parity = compare_streams(reference, engine, rows, steps, gates, case.listener, alone)
    except BuildError as error:
        found.check(name, "failed", str(error))
        return None
    failures = parity.failures()
    if precision.name != "fp32":
        failures += parity.failures_against(
            pytorch_in_precision(precision, case.model, plan, rows, steps, alone=alone), OWN
        )
    detail = f"max |Δlogit| {parity.worst:.2g} on {running.gpu.name}, within all {precision.gates} gates"
    status: Status = "failed" if failures else "passed"
    found.checks.append(Check(name, status, "; ".join(failures) or detail, time.perf_counter() - begin))
    return parity


def _text(running: RunningEngines, prompts: Sequence[int]) -> tuple[Rows, Rows]:
    """The ragged rows, and those of one batch each that cross the model's lengths and fit into the engines."""
    case, limits, steps = running.case, running.limits, running.case.settings.decode_steps
    start = len(case.text.start)
    crossed = crossed_by(case.model, steps, [start + prompt for prompt in prompts])
    alone = [p for p in crossing_prompts(crossed) if p <= limits.max_seq and p + steps <= limits.max_context]
    rows = case.rows([*prompts, *(max(1, prompt - start) for prompt in alone)])
    return rows[: len(prompts)], rows[len(prompts) :]


# speed -------------------------------------------------------------------------------------------

BASE_ENGINE, LINEARIZED_ENGINE = f"{BASE} engine", f"{LINEARIZED} engine"


def gpu_candidates(running: RunningEngines) -> list[Candidate]:
    """Who takes part on a GPU: both engines, both graphs in ONNX Runtime's CUDA provider, eager PyTorch.

    PyTorch's copy of the model is made in the engines' precision when it is first asked for.
    """
    case = running.case
    made: dict[str, torch.nn.Module] = {}

    def eager(context: int, batch: int = 1) -> Prompt:
        if BASE not in made:
            made[BASE] = in_precision(case.model, running.precision.gates, "cuda")
        return TorchPrompt(made[BASE], context, batch)

    def own(role: str, name: str) -> str | None:
        return name.format(BASE) if role == LINEARIZED else None

    engine, cuda = "{} engine", "onnxruntime CUDA, {}"
    engines = [
        Candidate(engine.format(role), partial(EnginePrompt, stream), own(role, engine))
        for role, stream in running.streams.items()
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


def engine_speed(running: RunningEngines, contexts: Sequence[int], found: Measurement) -> Speed | None:
    """Everything that runs on the GPU, timed at those of ``contexts`` that the engines hold."""
    case, limits = running.case, running.limits
    longest = min(limits.max_seq, limits.max_context - TIMED_STEPS)
    fitting = [c for c in contexts if c <= longest] or [longest] * (longest > 0)
    if dropped := sorted(set(contexts) - set(fitting)):
        found.notes.append(
            f"The engines are not timed at {', '.join(map(str, dropped))} tokens: they are built for a prefill of "
            f"{limits.max_seq:,} and a context of {limits.max_context:,}."
        )
    speed = measure_engine_speed(
        running.gpu, gpu_candidates(running), fitting, case.settings.rounds, case.listener
    )
    found.notes += [f"Not timed on the GPU: {name}: {why}." for name, why in speed.absent()]
    return speed if any(cell.results for cell in speed.cells) else None
