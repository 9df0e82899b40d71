"""Measure a rewritten encoder graph: parity, method loss, speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.batch.rows import Inputs, Outputs, batch_of_rows
from nbl_export.linearize.swap import linearized
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import encoder_of
from nbl_export.models.layers import positions
from nbl_export.models.load import in_precision
from nbl_export.models.weights import resident, room
from nbl_export.runtime.ort import OrtEncoder
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.verify.case import EncoderCase, crossing_batches, crossing_check, only_beyond
from nbl_export.verify.loss import loss_checks, measure_likeness
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.parity.figures import UNMODIFIED, EncoderParity, gates_for
from nbl_export.verify.parity.pytorch import OWN
from nbl_export.verify.parity.unmodified import against_unmodified, first_divergence
from nbl_export.verify.parity.vectors import compare_batches
from nbl_export.verify.speed.candidates import EncoderPass
from nbl_export.verify.speed.pair import fitting_contexts, verify_speed
from nbl_export.verify.speed.values import ENCODE

# Ragged on purpose, and few enough that their padding is seen to be hidden.
_LENGTHS = (64, 41, 23, 9)


def measure_encoder(case: EncoderCase) -> Measurement:
    """Everything that is asked of a rewritten encoder."""
    found, encoder = Measurement(), _reference(case)
    with resident(case.model, room(case.model)):
        with found.clock():
            found.parity = measure_parity(case, encoder, found)
        if case.settings.quality:
            with found.clock():
                loss = measure_likeness(encoder, case.plan, case.heldout, case.unit, case.listener)
                found.method_loss = loss
                found.checks += loss_checks(loss, case.settings.bound)
        else:
            found.check("method loss", "skipped", "--no-quality")
    with found.clock():
        batches = _timed(case, found) if case.why_not_timed is None else {}
        found.speed = verify_speed(
            case,
            found,
            list(batches),
            (ENCODE,),
            lambda model, tokens, _batch: EncoderPass(model, batches[tokens]),
        )
    return found


def _reference(case: EncoderCase) -> TorchEncoder:
    return TorchEncoder(encoder_of(case.model, case.task, case.pooling, case.plan.probe))


def measure_parity(case: EncoderCase, encoder: TorchEncoder, found: Measurement) -> EncoderParity:
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
        # PyTorch's own run in the graph's precision: what that precision costs anyone.
        dummy_run(case.model)
        in_half = _reference(case)
        in_half.encoder.model = in_precision(case.model, precision.gates)
        with linearized(in_half.encoder.model, case.plan):
            own = compare_batches(reference, _outputs(in_half, batches), batches, gates)
        failures += parity.failures_against(own, OWN)
    against = against_unmodified(
        case.baseline, case.rewritten, case.plan, lambda path: unlike(case, path, batches, graph)
    )

    def lost() -> str | None:
        if failures and alone and not compare_batches(reference[:1], graph[:1], [ragged], gates).failures():
            return only_beyond(crossings)
        return str(first_divergence(case.model, case.plan, case.rewritten)) if failures else None

    names = ", ".join(o.output for o in parity.outputs)
    within = f"max relative difference {parity.worst:.2g} in {names}, within all {precision.gates} gates"
    found.check_parity([*failures, *against], within, lost)
    found.checks += crossing_check(crossings)
    return EncoderParity(
        **vars(parity),
        precision=precision.name,
        pytorch_in_precision=own.outputs if own else None,
        crossings=crossings,
    )


def _outputs(encoder: Callable[[Inputs], Outputs], batches: Sequence[Inputs]) -> list[Outputs]:
    return [encoder(batch) for batch in batches]


def unlike(
    case: EncoderCase, reference: Path, batches: Sequence[Inputs], graph: Sequence[Outputs]
) -> list[str]:
    """The gates that what the rewritten ``graph`` gave fails against the unmodified one with its linear layers."""
    expected = _outputs(OrtEncoder(reference, small=True), batches)
    return compare_batches(expected, graph, batches, gates_for(UNMODIFIED)).failures()


def _batch(case: EncoderCase) -> Inputs:
    """A few held-out rows, those of text cut to different lengths, their ends kept."""
    rows = []
    for i, length in enumerate(_LENGTHS):
        row = case.heldout[i % len(case.heldout)]
        if TOKENS in row:
            row = {n: np.concatenate([a[:, :-1][:, : length - 1], a[:, -1:]], axis=1) for n, a in row.items()}
        rows.append(row)
    return batch_of_rows(rows, case.pad, case.left)


def _timed(case: EncoderCase, found: Measurement) -> dict[int, Inputs]:
    """What is timed by its number of tokens: text of each context length, or one image."""
    first = case.heldout[0]
    if PIXELS in first:
        return {dummy_run(case.model).tokens: first}
    tokens = np.concatenate([row[TOKENS][0] for row in case.heldout])
    contexts = fitting_contexts(found, positions(case.model), case.settings.contexts)
    rows = {c: {n: np.resize(tokens if n == TOKENS else 0, (1, c)) for n in first} for c in contexts}
    return {c: batch_of_rows([row]) for c, row in rows.items()}
