"""Run the built engines: parity against PyTorch and speed against everything else on the same GPU.

Without a GPU nothing is run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.checks import Check, Status
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
from nbl_export.runtime.session import CUDA
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import torch_stream
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.measurement import Found
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import EngineParity, Parity, gates_for
from nbl_export.verify.parity.own import OWN, pytorch_in_precision
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


# Ragged on purpose: the batch must be padded on the left, by different amounts.
PROMPTS = (64, 41, 23)


def scaled_prompts(longest: int) -> list[int]:
    """The lengths of :data:`PROMPTS`, none above ``longest``: scaled, not cut, so that the batch stays ragged."""
    scale = min(1.0, longest / max(PROMPTS))
    return [max(1, int(p * scale)) for p in PROMPTS]


def fitting_prompts(positions: int | None, start: int, steps: int) -> list[int]:
    """Lengths of prompts that leave room for ``start`` tokens before and ``steps`` after them in the ``positions``.

    They are shorter only for a model with few positions. Raises :class:`InputError` for more steps than fit.
    """
    if positions is None or start + max(PROMPTS) + steps <= positions:
        return list(PROMPTS)
    longest = min(max(PROMPTS), positions // 2)
    if (most := positions - start - longest) < steps:
        raise InputError(
            f"--decode-steps asks for {steps:,} steps after a prompt of {start + longest} tokens, the model has "
            f"{positions:,} positions: ask for {max(most, 1):,} or fewer."
        )
    return scaled_prompts(longest)


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
) -> tuple[Found[None], Found[EngineParity], Found[Speed]]:
    """What was built, and on a GPU its parity and its speed; without one, a line that says so."""
    if not case.engines:
        return Found(checks=_other_engines(case)), Found(), Found()
    built = built_check(case.engines)
    running = _loaded(case)
    if isinstance(running, Check):
        return Found(checks=(built, running)), Found(), Found()
    prompts = _fitting_prompts(running)
    if isinstance(prompts, Check):
        return Found(checks=(built, prompts)), Found(), Found()
    parity = _parity(running, prompts)
    passed = all(check.status != "failed" for check in parity.checks)
    speed = engine_speed(running, contexts) if case.settings.speed and passed else Found[Speed]()
    return Found(checks=(built,)), parity, speed


def _other_engines(case: DecoderCase) -> tuple[Check, ...]:
    return (Check("engine run", "skipped", case.passed_over),) if case.passed_over else ()


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
    return scaled_prompts(longest)[: limits.max_batch]


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
    name, begin = "engine parity" if role == LINEARIZED else f"{role} engine parity", time.perf_counter()
    (rows, alone), steps = _text(running, prompts), case.settings.decode_steps
    try:
        with linearized(case.model, plan):
            reference, gates = torch_stream(case.model, plan.linear_attention), gates_for(precision.gates)
            engine = running.streams[role]
            parity = compare_streams(reference, engine, rows, steps, gates, case.listener, alone)
    except BuildError as error:
        return None, Check(name, "failed", str(error))
    failures = parity.failures()
    if precision.name != "fp32":
        failures += parity.failures_against(
            pytorch_in_precision(precision, case.model, plan, rows, steps, alone=alone), OWN
        )
    detail = f"max |Δlogit| {parity.worst:.2g} on {running.gpu.name}, within all {precision.gates} gates"
    status: Status = "failed" if failures else "passed"
    return parity, Check(name, status, "; ".join(failures) or detail, time.perf_counter() - begin)


Rows = list[NDArray[np.int32]]


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


def engine_speed(running: RunningEngines, contexts: Sequence[int]) -> Found[Speed]:
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
    speed = measure_engine_speed(
        running.gpu, gpu_candidates(running), fitting, case.settings.rounds, case.listener
    )
    notes += [f"Not timed on the GPU: {name}: {why}." for name, why in speed.absent()]
    return Found(speed if any(cell.results for cell in speed.cells) else None, notes=tuple(notes))
