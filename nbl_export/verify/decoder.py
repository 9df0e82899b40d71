"""All measurements of a rewritten graph in order: parity, method loss, speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.calibrate.text import CalibrationText
from nbl_export.checks import Check
from nbl_export.engine.gpu import Gpu, find_gpu
from nbl_export.engine.pair import EngineFile
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.half_emulation import UNTIMED, needs_emulation
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import Precision, graph_precision, precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.layers import positions
from nbl_export.models.load import in_precision
from nbl_export.progress import Listener
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings import VerifySettings
from nbl_export.verify.engines import EngineCase, built_check, engine_speed, not_run
from nbl_export.verify.loss.decoder import measure_method_loss
from nbl_export.verify.parity.decoder import Parity, compare_streams, gates_for
from nbl_export.verify.parity.localize import first_divergence
from nbl_export.verify.parity.noise import rounding_noise
from nbl_export.verify.speed.checks import speed_check
from nbl_export.verify.speed.pair import Pair, explained, measure_speed
from nbl_export.verify.speed.values import Speed

if TYPE_CHECKING:
    import torch

# Ragged on purpose: the batch must be padded on the left, by different amounts.
_PROMPTS = (64, 41, 23)


@dataclass
class Measurement:
    """What was measured, as the report's sections; a section that was not run is None and a check says why."""

    parity: dict[str, Any] | None = None
    divergence: str | None = None
    method_loss: dict[str, Any] | None = None
    speed: Speed | None = None
    engine_parity: dict[str, Any] | None = None
    engine_speed: Speed | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure_decoder(
    model: torch.nn.Module,
    plan: Plan,
    text: CalibrationText,
    baseline: Path,
    rewritten: Path,
    engines: Sequence[EngineFile],
    settings: VerifySettings,
    listener: Listener,
) -> Measurement:
    """Measure the graph ``rewritten`` from ``baseline`` by ``plan``, and its engines, against ``model``."""
    result = Measurement()
    graph = load_graph(rewritten)
    precision = graph_precision(graph)
    rows = _rows(text, _PROMPTS, settings.decode_steps)
    _measure_parity(
        result, model, plan, baseline, rewritten, rows, settings.decode_steps, precision, listener
    )
    if settings.quality:
        loss = measure_method_loss(model, plan, text.heldout, text.heldout_document, listener)
        result.method_loss = loss.as_json()
    else:
        result.checks.append(Check("method loss", "skipped", "--no-quality"))
    contexts, notes = fitting_contexts(positions(model), settings.contexts, room=1)
    result.notes += notes
    if why := why_not_timed(graph, settings):
        result.checks.append(Check("speed", "skipped", why))
    else:
        pair = Pair(baseline, rewritten)
        speed = measure_speed(pair, contexts, settings.rounds, listener)
        result.speed = explained(speed, pair, listener)
        result.checks.append(speed_check(result.speed))
    if engines:
        graphs = {BASE: baseline, LINEARIZED: rewritten}
        _measure_engines(result, model, plan, text, graphs, engines, contexts, settings, listener)
    return result


def why_not_timed(graph: ir.Model, settings: VerifySettings) -> str | None:
    """Why the speed of ``graph`` is not measured; None if it is."""
    if not settings.speed:
        return "--no-speed"
    if needs_emulation(graph):
        return UNTIMED
    return None


def _rows(text: CalibrationText, prompts: Sequence[int], steps: int) -> list[NDArray[np.int32]]:
    # Prompts begin with the beginning-of-text token, as in use: without it the attention sinks of a
    # linearized model settle on chance tokens, which can amplify rounding a hundredfold.
    ends = np.cumsum([prompt + steps for prompt in prompts])
    pieces = np.split(np.resize(text.heldout.reshape(-1), ends[-1]), ends[:-1])
    return [text.prompt(piece) for piece in pieces]


def _measure_parity(
    result: Measurement,
    model: torch.nn.Module,
    plan: Plan,
    baseline: Path,
    rewritten: Path,
    rows: list[NDArray[np.int32]],
    steps: int,
    precision: Precision,
    listener: Listener,
) -> None:
    gates = gates_for(precision.gates)
    with linearized(model, plan):
        candidate = ort_stream(rewritten, max(map(len, rows)))
        cached = candidate.kv_layers is not None
        reference = torch_stream(model, plan.chosen, cached)
        parity = compare_streams(reference, candidate, rows, steps, gates, listener)
        failures = parity.failures()
        if precision.name == "fp16":
            # The figures are those of the graph rounded as it says; the file itself must run too.
            itself = ort_stream(rewritten, max(map(len, rows)), rounded=False)
            unrounded = compare_streams(reference, itself, rows, steps, gates)
            failures += [f"as onnxruntime runs it, {failure}" for failure in unrounded.failures()]
        noise = rounding_noise(model, rows)
    result.parity = {**parity.as_json(), "precision": precision.name, "rounding_noise": noise}
    if precision.quantized:
        # What the quantization costs the unmodified model is not the rewrite's to answer for.
        base = compare_streams(
            torch_stream(model, cached=cached), ort_stream(baseline, max(map(len, rows))), rows, steps, gates
        )
        result.parity["base_graph"] = base.as_json()["steps"]
        failures += parity.failures_against(base, "the unmodified graph's own")
    elif precision.name != "fp32":
        own = _pytorch_in(precision, model, plan, rows, steps, cached)
        result.parity["pytorch_in_precision"] = own.as_json()["steps"]
        failures += parity.failures_against(own, "PyTorch's own in this precision")
    if not failures:
        worst = max(s.max_abs for s in parity.steps)
        detail = f"max |Δlogit| {worst:.2g} over a prefill and {steps} decode steps, within all {precision.gates} gates"
        result.checks.append(Check("parity", "passed", detail))
        return
    first = first_divergence(model, plan, rewritten)
    result.divergence = str(first)
    if first.layer is None and noise > parity.gates.max_abs_logit / 4:
        result.divergence = (
            "every attention layer agrees, but the linearized PyTorch model's own logits move by "
            f"{noise:.1e} when its embeddings change in the last bit: this plan amplifies rounding; "
            "try other layers or another criterion"
        )
    result.checks.append(Check("parity", "failed", "; ".join([*failures, result.divergence])))


def _pytorch_in(
    precision: Precision,
    model: torch.nn.Module,
    plan: Plan,
    rows: list[NDArray[np.int32]],
    steps: int,
    cached: bool = True,
) -> Parity:
    """PyTorch's own run in the graph's precision against its float32: what that precision costs anyone."""
    half = in_precision(model, precision.gates)
    with linearized(model, plan), linearized(half, plan):
        pair = [torch_stream(m, plan.chosen, cached) for m in (model, half)]
        return compare_streams(pair[0], pair[1], rows, steps, gates_for(precision.gates))


def _measure_engines(
    result: Measurement,
    model: torch.nn.Module,
    plan: Plan,
    text: CalibrationText,
    graphs: dict[str, Path],
    engines: Sequence[EngineFile],
    contexts: Sequence[int],
    settings: VerifySettings,
    listener: Listener,
) -> None:
    """Engine checks: what was built, and on a GPU its parity and its speed; without one, a line that says so."""
    result.checks.append(built_check(engines))
    gpu = find_gpu()
    if gpu is None:
        result.checks.append(not_run(engines, "no NVIDIA GPU"))
        return
    try:
        streams = {e.manifest.role: EngineStream(load_engine(e.path)) for e in engines}
    except (MissingDependencyError, InputError) as error:
        result.checks.append(not_run(engines, str(error)))
        return
    except BuildError as error:
        result.checks.append(Check("engine run", "failed", str(error)))
        return
    limits = engines[0].manifest.limits
    longest = min(limits["max_seq"], limits["max_context"] - settings.decode_steps) - len(text.start)
    if longest < 1:
        why = (
            f"a context of {limits['max_context']} and a prefill of {limits['max_seq']} tokens hold no prompt and "
            f"{settings.decode_steps} decode steps"
        )
        result.checks.append(not_run(engines, why))
        return
    # Scaled, not cut: the batch stays ragged.
    scale = min(1.0, longest / max(_PROMPTS))
    prompts = [max(1, int(p * scale)) for p in _PROMPTS[: limits["max_batch"]]]
    rows = _rows(text, prompts, settings.decode_steps)
    precision = precision_of(engines[0].manifest.precision)
    for role, layers in ((BASE, plan.without_layers()), (LINEARIZED, plan)):
        _measure_engine_parity(
            result, model, layers, role, streams[role], rows, settings, precision, gpu, listener
        )
    if settings.speed and not any("engine" in c.name and c.status == "failed" for c in result.checks):
        case = EngineCase(gpu, model, streams, graphs, precision.name, limits)
        result.engine_speed, notes = engine_speed(case, contexts, settings.rounds, listener)
        result.notes += notes


def _measure_engine_parity(
    result: Measurement,
    model: torch.nn.Module,
    plan: Plan,
    role: str,
    stream: EngineStream,
    rows: list[NDArray[np.int32]],
    settings: VerifySettings,
    precision: Precision,
    gpu: Gpu,
    listener: Listener,
) -> None:
    """One engine against PyTorch with the same plan; the base engine's has no linear layer."""
    name = "engine parity" if role == LINEARIZED else f"{role} engine parity"
    gates, steps = gates_for(precision.gates), settings.decode_steps
    try:
        with linearized(model, plan):
            reference = torch_stream(model, plan.chosen)
            parity = compare_streams(reference, stream, rows, steps, gates, listener)
    except BuildError as error:
        result.checks.append(Check(name, "failed", str(error)))
        return
    failures = parity.failures()
    if precision.name != "fp32":
        own = _pytorch_in(precision, model, plan, rows, steps)
        failures += parity.failures_against(own, "PyTorch's own in this precision")
    worst = max(s.max_abs for s in parity.steps)
    detail = f"max |Δlogit| {worst:.2g} on {gpu.name}, within all {precision.gates} gates"
    result.checks.append(Check(name, "failed" if failures else "passed", "; ".join(failures) or detail))
    found = parity.as_json() if role == LINEARIZED else {role: parity.as_json()}
    result.engine_parity = (result.engine_parity or {}) | found


def fitting_contexts(
    limit: int | None, contexts: Sequence[int], room: int = 0
) -> tuple[list[int], list[str]]:
    """Those of ``contexts`` that leave ``room`` more of the model's ``limit`` positions; a note names the others."""
    fitting = [c for c in contexts if limit is None or c + room <= limit]
    dropped = ", ".join(map(str, sorted(set(contexts) - set(fitting))))
    notes = [f"Speed at {dropped} tokens is left out: the model has {limit} positions."] if dropped else []
    return fitting or [max(2, (limit or 16) // 2)], notes
