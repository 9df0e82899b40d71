"""All measurements of a rewritten encoder graph in order: parity, method loss, speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.batch.rows import Inputs, Outputs, batch_of_rows
from nbl_export.linearize.swap import linearized
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.encoder import encoder_of
from nbl_export.models.layers import positions
from nbl_export.models.load import in_precision
from nbl_export.models.weights import resident, room
from nbl_export.runtime.ort import OrtEncoder, OrtModel
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.verify.case import EncoderCase
from nbl_export.verify.crossing import crossing_batches, crossing_check, only_beyond
from nbl_export.verify.loss.encoder import measure_likeness
from nbl_export.verify.measurement import (
    Found,
    FoundParity,
    Measurement,
    clocked,
    fitting_contexts,
    judged,
    method_loss,
    put_together,
    timed,
)
from nbl_export.verify.parity.encoder import compare_batches, compare_outputs
from nbl_export.verify.parity.figures import UNMODIFIED, EncoderParity, OutputsParity, gates_for
from nbl_export.verify.parity.localize import first_divergence
from nbl_export.verify.parity.own import OWN
from nbl_export.verify.parity.unmodified import against_unmodified
from nbl_export.verify.speed.candidates import EncoderPass
from nbl_export.verify.speed.pair import Pair
from nbl_export.verify.speed.values import ENCODE, Speed

# Ragged on purpose, and few enough that their padding is seen to be hidden.
_LENGTHS = (64, 41, 23, 9)


def measure_encoder(case: EncoderCase) -> Measurement:
    """Everything that is asked of a rewritten encoder."""
    encoder = _reference(case)
    plan, heldout, unit = case.plan, case.heldout, case.unit
    with resident(case.model, room(case.model)):
        parity = clocked(lambda: measure_parity(case, encoder))
        likeness = partial(measure_likeness, encoder, plan, heldout, unit, case.listener)
        loss = clocked(lambda: method_loss(case, likeness))
    return put_together(parity, loss, clocked(lambda: _speed(case)))


def _reference(case: EncoderCase) -> TorchEncoder:
    return TorchEncoder(encoder_of(case.model, case.task, case.pooling, case.plan.probe))


def measure_parity(case: EncoderCase, encoder: TorchEncoder) -> FoundParity[EncoderParity]:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, ragged = case.precision, _batch(case)
    alone, crossings = crossing_batches(case, ragged)
    batches = [ragged, *alone]
    gates = gates_for(precision.gates)
    with case.listener.task("Comparing with PyTorch", len(batches), "batches") as task:
        with linearized(case.model, case.plan):
            reference = _outputs(encoder, batches)
        graph = _outputs(OrtEncoder(case.rewritten, small=True), batches)
        parity = compare_batches(reference, graph, batches, gates)
        task.advance(len(batches))
    failures = parity.failures()
    own = None
    if precision.name == "fp16":
        # The figures are those of the graph rounded as it says; the file itself must run too, where it can.
        unrounded = _outputs(OrtEncoder(case.rewritten, rounded=False, small=True), batches)
        itself = compare_batches(reference, unrounded, batches, gates)
        failures += [f"as onnxruntime runs it, {failure}" for failure in itself.failures()]
    if precision.name != "fp32":
        own = _pytorch_in_precision(case, reference, batches)
        failures += parity.failures_against(own, OWN)
    against = against_unmodified(
        case.baseline, case.rewritten, case.plan, lambda path: unlike(case, path, batches, graph)
    )
    section = EncoderParity(
        **vars(parity),
        precision=precision.name,
        pytorch_in_precision=own.outputs if own else None,
        crossings=crossings,
    )
    beyond = (
        bool(failures)
        and bool(alone)
        and not compare_outputs(reference[0], graph[0], ragged, gates).failures()
    )
    names = ", ".join(o.output for o in parity.outputs)
    within = f"max relative difference {parity.worst:.2g} in {names}, within all {precision.gates} gates"
    lost = (
        (lambda: str(first_divergence(case.model, case.plan, case.rewritten))) if failures else (lambda: None)
    )
    if beyond:
        lost = partial(only_beyond, crossings)
    result = judged(section, [*failures, *against], within, lost)
    return replace(result, checks=(*result.checks, *crossing_check(crossings)))


def _outputs(encoder: Callable[[Inputs], Outputs], batches: Sequence[Inputs]) -> list[Outputs]:
    return [encoder(batch) for batch in batches]


def unlike(
    case: EncoderCase, reference: Path, batches: Sequence[Inputs], graph: Sequence[Outputs] | None = None
) -> list[str]:
    """The gates that the rewritten graph fails against the unmodified one with the linear layers put in.

    ``graph`` is what the rewritten graph gave for the ``batches``, if it is known.
    """
    expected = _outputs(OrtEncoder(reference, small=True), batches)
    found = graph or _outputs(OrtEncoder(case.rewritten, small=True), batches)
    return compare_batches(expected, found, batches, gates_for(UNMODIFIED)).failures()


def _batch(case: EncoderCase) -> Inputs:
    """A few held-out rows, those of text cut to different lengths, their ends kept."""
    rows = []
    for i, length in enumerate(_LENGTHS):
        row = case.heldout[i % len(case.heldout)]
        if TOKENS in row:
            row = {n: np.concatenate([a[:, :-1][:, : length - 1], a[:, -1:]], axis=1) for n, a in row.items()}
        rows.append(row)
    return batch_of_rows(rows, case.pad, case.left)


def _pytorch_in_precision(
    case: EncoderCase, reference: Sequence[Outputs], batches: Sequence[Inputs]
) -> OutputsParity:
    """PyTorch's own run in the graph's precision against its float32: what that precision costs anyone."""
    dummy_run(case.model)
    gates = case.precision.gates
    half = in_precision(case.model, gates)
    encoder = _reference(case)
    encoder.encoder.model = half
    with linearized(half, case.plan):
        return compare_batches(reference, _outputs(encoder, batches), batches, gates_for(gates))


def _speed(case: EncoderCase) -> Found[Speed]:
    batches, notes = _timed(case) if case.why_not_timed is None else ({}, ())

    def run(model: OrtModel, tokens: int, _batch: int) -> EncoderPass:
        return EncoderPass(model, batches[tokens])

    return timed(case, notes, lambda baseline: Pair(baseline, case.rewritten, (ENCODE,), run), list(batches))


def _timed(case: EncoderCase) -> tuple[dict[int, Inputs], tuple[str, ...]]:
    """What is timed by its number of tokens: text of each context length, or one image; notes on what is left out."""
    first = case.heldout[0]
    if PIXELS in first:
        return {dummy_run(case.model).tokens: first}, ()
    tokens = np.concatenate([row[TOKENS][0] for row in case.heldout])
    contexts, notes = fitting_contexts(positions(case.model), case.settings.contexts)
    rows = {c: {n: np.resize(tokens if n == TOKENS else 0, (1, c)) for n in first} for c in contexts}
    return {c: batch_of_rows([row]) for c, row in rows.items()}, notes
