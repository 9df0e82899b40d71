"""All measurements of a rewritten encoder graph in order: parity, method loss, speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.batch.rows import Inputs, batch_of_rows
from nbl_export.checks import Check
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import Precision, graph_precision
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.encoder import encoder_of
from nbl_export.models.layers import positions
from nbl_export.models.load import in_precision
from nbl_export.models.pooling import Pooling
from nbl_export.models.tasks import Task
from nbl_export.models.trial import trial
from nbl_export.progress import Listener
from nbl_export.runtime.encoder import OrtEncoder, TorchEncoder
from nbl_export.settings import VerifySettings
from nbl_export.verify.decoder import Measurement, fitting_contexts, why_not_timed
from nbl_export.verify.loss.encoder import measure_likeness
from nbl_export.verify.parity.decoder import gates_for
from nbl_export.verify.parity.encoder import EncoderParity, compare_outputs
from nbl_export.verify.parity.localize import first_divergence
from nbl_export.verify.speed.candidates import EncoderPass
from nbl_export.verify.speed.checks import speed_check
from nbl_export.verify.speed.pair import Pair, explained, measure_speed
from nbl_export.verify.speed.values import ENCODE

if TYPE_CHECKING:
    import torch

# Ragged on purpose, and few enough that their padding is seen to be hidden.
_LENGTHS = (64, 41, 23, 9)


@dataclass(frozen=True)
class EncoderCase:
    """A model and how it is judged: ``heldout`` are batches of one, padded together with the token ``pad``."""

    model: torch.nn.Module
    task: Task
    pooling: Pooling | None
    heldout: Sequence[Inputs]
    unit: str
    pad: int = 0
    left: bool = False


def measure_encoder(
    case: EncoderCase,
    plan: Plan,
    baseline: Path,
    rewritten: Path,
    settings: VerifySettings,
    listener: Listener,
) -> Measurement:
    """Measure the graph ``rewritten`` from ``baseline`` by ``plan`` against ``case.model``."""
    result = Measurement()
    graph = load_graph(rewritten)
    encoder = TorchEncoder(encoder_of(case.model, case.task, case.pooling, plan.probe))
    _measure_parity(result, case, encoder, plan, rewritten, graph_precision(graph), listener)
    if settings.quality:
        result.method_loss = measure_likeness(encoder, plan, case.heldout, case.unit, listener).as_json()
    else:
        result.checks.append(Check("method loss", "skipped", "--no-quality"))
    if why := why_not_timed(graph, settings):
        result.checks.append(Check("speed", "skipped", why))
    else:
        batches, notes = _timed(case, settings)
        result.notes += notes
        pair = Pair(
            baseline, rewritten, (ENCODE,), lambda model, tokens, _: EncoderPass(model, batches[tokens])
        )
        speed = measure_speed(pair, list(batches), settings.rounds, listener)
        result.speed = explained(speed, pair, listener)
        result.checks.append(speed_check(result.speed))
    return result


def _batch(case: EncoderCase) -> Inputs:
    """A few held-out rows, those of text cut to different lengths, their ends kept."""
    rows = []
    for i, length in enumerate(_LENGTHS):
        row = case.heldout[i % len(case.heldout)]
        if TOKENS in row:
            row = {n: np.concatenate([a[:, :-1][:, : length - 1], a[:, -1:]], axis=1) for n, a in row.items()}
        rows.append(row)
    return batch_of_rows(rows, case.pad, case.left)


def _measure_parity(
    result: Measurement,
    case: EncoderCase,
    encoder: TorchEncoder,
    plan: Plan,
    rewritten: Path,
    precision: Precision,
    listener: Listener,
) -> None:
    gates, inputs = gates_for(precision.gates), _batch(case)
    with listener.task("Comparing with PyTorch", 1, "batch") as task:
        with linearized(case.model, plan):
            reference = encoder(inputs)
        parity = compare_outputs(reference, OrtEncoder(rewritten)(inputs), inputs, gates)
        task.advance(1)
    failures = parity.failures()
    result.parity = {**parity.as_json(), "precision": precision.name}
    if precision.name != "fp32":
        # The figures are those of the graph rounded as it says; the file itself must run too, where it can.
        if precision.name == "fp16":
            itself = compare_outputs(reference, OrtEncoder(rewritten, rounded=False)(inputs), inputs, gates)
            failures += [f"as onnxruntime runs it, {failure}" for failure in itself.failures()]
        own = _pytorch_in(precision, case, plan, reference, inputs)
        result.parity["pytorch_in_precision"] = own.as_json()["outputs"]
        failures += parity.failures_against(own, "PyTorch's own in this precision")
    if not failures:
        names = ", ".join(o.output for o in parity.outputs)
        detail = f"max relative difference {parity.worst:.2g} in {names}, within all {precision.gates} gates"
        result.checks.append(Check("parity", "passed", detail))
        return
    result.divergence = str(first_divergence(case.model, plan, rewritten))
    result.checks.append(Check("parity", "failed", "; ".join([*failures, result.divergence])))


def _pytorch_in(
    precision: Precision, case: EncoderCase, plan: Plan, reference: dict[str, np.ndarray], inputs: Inputs
) -> EncoderParity:
    """PyTorch's own run in the graph's precision against its float32: what that precision costs anyone."""
    trial(case.model)
    half = in_precision(case.model, precision.gates)
    encoder = TorchEncoder(encoder_of(case.model, case.task, case.pooling, plan.probe))
    encoder.encoder.model = half
    with linearized(half, plan):
        return compare_outputs(reference, encoder(inputs), inputs, gates_for(precision.gates))


def _timed(case: EncoderCase, settings: VerifySettings) -> tuple[dict[int, Inputs], list[str]]:
    """What is timed by its number of tokens: text of each context length, or one image; notes on what is left out."""
    first = case.heldout[0]
    if PIXELS in first:
        return {trial(case.model).tokens: first}, []
    tokens = np.concatenate([row[TOKENS][0] for row in case.heldout])
    contexts, notes = fitting_contexts(positions(case.model), settings.contexts)
    rows = {c: {n: np.resize(tokens if n == TOKENS else 0, (1, c)) for n in first} for c in contexts}
    return {c: batch_of_rows([row]) for c, row in rows.items()}, notes
