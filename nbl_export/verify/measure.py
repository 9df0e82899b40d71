"""Measure a rewritten decoder or encoder: parity, method loss, speed, engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.batch.rows import Inputs, Outputs, batch_of_rows
from nbl_export.graph.interface import interface_of
from nbl_export.linearize.swap import linearized
from nbl_export.models.attention import Routers
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import encoder_of
from nbl_export.models.layers import positions
from nbl_export.models.media_tokens import seeing
from nbl_export.models.weights import in_precision, resident, room
from nbl_export.rewrite.routers import routers
from nbl_export.runtime.ort import OrtModel, Watch, ort_stream
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.verify.case import (
    Case,
    DecoderCase,
    EncoderCase,
    Measurement,
    crossing_batches,
    crossing_check,
    only_beyond,
    parity_text,
)
from nbl_export.verify.engines import measure_engines
from nbl_export.verify.loss import loss_checks, measure_likeness, measure_method_loss
from nbl_export.verify.parity.compare import COMPARING, Recorded, Rows, compare, compare_batches, record
from nbl_export.verify.parity.figures import (
    UNMODIFIED,
    DecoderParity,
    EncoderParity,
    Gates,
    Parity,
    gates_for,
)
from nbl_export.verify.parity.pytorch import (
    OWN,
    media_parity,
    pytorch_in_precision,
    record_pytorch,
    rounding_noise,
    rows_with_media,
)
from nbl_export.verify.parity.routing import (
    Choices,
    Reference,
    choices_as_outputs,
    choices_of,
    moved_by_rounding,
    passes,
    routing_failures,
    routing_of,
)
from nbl_export.verify.parity.unmodified import differences, first_divergence, kept_cache
from nbl_export.verify.speed.candidates import EncoderPass
from nbl_export.verify.speed.pair import fitting_contexts, verify_speed
from nbl_export.verify.speed.values import ENCODE

# Ragged on purpose, and few enough that their padding is seen to be hidden.
_LENGTHS = (64, 41, 23, 9)


def measure(case: DecoderCase | EncoderCase) -> Measurement:
    """Everything that is asked of a rewritten graph, and of a decoder's engines if there are any."""
    if isinstance(case, EncoderCase):
        return measure_encoder(case)
    found, text = Measurement(), case.text
    contexts = fitting_contexts(found, positions(case.model), case.settings.contexts, room=1)
    with seeing(case.model, text.media):
        with resident(case.model, room(case.model)):
            with found.clock():
                found.parity = decoder_parity(case, found)
            with found.clock():
                if _asks_for_loss(case, found):
                    found.method_loss = measure_method_loss(
                        case.model, case.plan, text.heldout, text.heldout_document, case.listener
                    )
                    found.checks += loss_checks(found.method_loss, case.settings.bound)
        with found.clock():
            found.speed = verify_speed(case, found, contexts)
        measure_engines(case, contexts, found)
    return found


def measure_encoder(case: EncoderCase) -> Measurement:
    """Everything that is asked of a rewritten encoder."""
    found = Measurement()
    encoder = TorchEncoder(encoder_of(case.model, case.task, case.pooling, case.plan.probe))
    with resident(case.model, room(case.model)):
        with found.clock():
            found.parity = encoder_parity(case, encoder, found)
        with found.clock():
            if _asks_for_loss(case, found):
                likeness = measure_likeness(encoder, case.plan, case.heldout, case.unit, case.listener)
                found.method_loss = likeness
                found.checks += loss_checks(likeness, case.settings.bound)
    with found.clock():
        timed = {} if case.why_not_timed else _timed(case, found)
        phases = (ENCODE,)
        found.speed = verify_speed(
            case, found, list(timed), phases, lambda model, tokens, _batch: EncoderPass(model, timed[tokens])
        )
    return found


def _asks_for_loss(case: Case, found: Measurement) -> bool:
    if not case.settings.quality:
        found.check("method loss", "skipped", "--no-quality")
    return case.settings.quality


# decoders -----------------------------------------------------------------------------------------


def decoder_parity(case: DecoderCase, found: Measurement) -> DecoderParity:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, steps, listener = case.precision, case.settings.decode_steps, case.listener
    gates, cached = gates_for(precision.gates), not interface_of(case.graph).cacheless
    rows, alone, crossings = parity_text(case, cached)
    routed = not precision.quantized and bool(routers(case.graph))
    torch = Reference(
        partial(record_pytorch, case.model, case.plan, rows, steps, cached, alone, listener=listener),
        passes(rows, steps, cached, alone) if routed else None,
    )
    graph, choices = _chosen(case, rows, cached, alone)
    reference, as_told = torch.like(choices)
    parity = compare(reference, graph, gates)
    failures = parity.failures()
    unrounded = None
    if precision.name == "fp16":
        # The figures are those of the graph rounded as it says; the file itself must run too.
        as_it_runs, others = _chosen(case, rows, cached, alone, rounded=False)
        expected, unrounded = torch.like(others)
        failures += _as_it_runs(compare(expected, as_it_runs, gates).failures())
    noise = rounding_noise(case.model, rows, case.plan, listener=listener)
    base = own = half = None
    if precision.quantized and case.baseline is not None:
        # What the quantization costs the unmodified model is not the rewrite's to answer for.
        original = record_pytorch(case.model, None, rows, steps, cached, alone, listener=listener)
        base = compare(original, _recorded(case, case.baseline, rows, alone=alone), gates)
        failures += parity.failures_against(base, "the unmodified graph's own")
    elif not precision.quantized and precision.name != "fp32":
        half = as_told and Routers(as_told.real, as_told.told)
        own = pytorch_in_precision(
            precision, case.model, case.plan, rows, steps, cached, reference, alone, half, listener
        )
        failures += parity.failures_against(own, OWN)
    routing = None
    if torch.own and as_told:
        moved = moved_by_rounding(as_told, half)
        routing = routing_of(torch.own, as_told, moved)
        failures += routing_failures(routing)
        if unrounded:
            failures += routing_failures(routing_of(torch.own, unrounded, moved))
    against = _against_unmodified(case, lambda path: unlike(case, path, rows, graph, alone))

    def lost() -> str | None:
        if failures and alone and not compare(reference.ragged, graph.ragged, gates).failures():
            return only_beyond(crossings)
        return _where_lost(case, parity, noise) if failures else None

    prefill = f"a prefill and {steps} decode steps, within all {precision.gates} gates"
    within = f"max |Δlogit| {parity.worst:.2g} over {prefill}"
    found.check_parity([*failures, *against], within, lost)
    found.checks += crossing_check(crossings)
    _check_media(case, gates, found)
    return DecoderParity(
        **vars(parity),
        precision=precision.name,
        rounding_noise=noise,
        base_graph=base.steps if base else None,
        pytorch_in_precision=own.steps if own else None,
        crossings=crossings,
        routing=routing,
    )


def _as_it_runs(failures: Sequence[str]) -> list[str]:
    return [f"as onnxruntime runs it, {failure}" for failure in failures]


def _against_unmodified(case: Case, compared: Callable[[Path], Sequence[str]]) -> list[str]:
    """What is wrong with the rewritten graph beside the unmodified one, if that is there."""
    if case.baseline is None:
        return []
    return differences(case.baseline, case.rewritten, case.plan, case.tensors, compared)


def _check_media(case: DecoderCase, gates: Gates, found: Measurement) -> None:
    """The verdict on texts with images and sounds, of a graph that reads embeddings and was calibrated on some."""
    media, embeds = case.text.media, interface_of(case.graph).embedding is not None
    rows = rows_with_media(case.text.heldout) if media is not None and embeds else []
    if media is None or not rows:
        return
    name = "parity with media"
    if layers := media.later.shape[1]:
        lacks = f"the model adds features of its images after its first {layers} layers (deepstack)"
        found.check(name, "failed", f"{lacks}, for which the graph has no inputs")
        return
    parity = media_parity(case.model, case.plan, case.rewritten, rows, media, gates, case.listener)
    texts = f"{len(rows)} text{'s' if len(rows) > 1 else ''} with images or sounds"
    within = f"max |Δlogit| {parity.worst:.2g} over {texts}, within all {case.precision.gates} gates"
    failures = parity.failures()
    found.check(name, "failed" if failures else "passed", "; ".join(failures) or within)


def unlike(
    case: DecoderCase, reference: Path, rows: Rows, graph: Recorded | None = None, alone: Rows = ()
) -> list[str]:
    """The gates that the rewritten graph fails against the unmodified one with the linear layers put in.

    ``graph`` is what the rewritten graph gave for ``rows`` and those ``alone``, if it is known.
    """
    expected = _recorded(case, reference, rows, alone=alone, title="Running the base graph")
    found = graph or _recorded(case, case.rewritten, rows, alone=alone)
    return compare(kept_cache(expected, case.plan), found, gates_for(UNMODIFIED)).failures()


def _recorded(
    case: DecoderCase,
    path: Path,
    rows: Rows,
    rounded: bool = True,
    alone: Rows = (),
    watch: Watch | None = None,
    title: str = COMPARING,
) -> Recorded:
    """What the graph at ``path`` gives for ``rows``; its session is closed when this returns."""
    stream = ort_stream(path, max(map(len, rows)), rounded=rounded, small=True, watch=watch)
    return record(stream, rows, case.settings.decode_steps, case.listener, alone, title)


def _chosen(
    case: DecoderCase, rows: Rows, cached: bool, alone: Rows, rounded: bool = True
) -> tuple[Recorded, Choices | None]:
    """What the rewritten graph gives for ``rows`` and those ``alone``, and its choices of experts, if it has any."""
    with choices_as_outputs(case.rewritten) as (path, watch):
        found = _recorded(case, path, rows, rounded, alone, watch)
    if watch is None:
        return found, None
    return found, choices_of(case.rewritten, watch, rows, case.settings.decode_steps, cached, alone)


def _where_lost(case: DecoderCase, parity: Parity, noise: float) -> str:
    first = first_divergence(case.model, case.plan, case.rewritten)
    if first.layer is None and noise > parity.gates.max_abs_logit / 4:
        return (
            "every attention layer agrees, but the linearized PyTorch model's own logits move by "
            f"{noise:.1e} when its embeddings change in the last bit: this plan amplifies rounding; "
            "try other layers or another criterion"
        )
    return str(first)


# encoders -----------------------------------------------------------------------------------------


def encoder_parity(case: EncoderCase, encoder: TorchEncoder, found: Measurement) -> EncoderParity:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, ragged = case.precision, _batch(case)
    alone, crossings = crossing_batches(case, ragged)
    batches, gates, own = [ragged, *alone], gates_for(precision.gates), None

    def outputs(of: Callable[[Inputs], Outputs]) -> list[Outputs]:
        return [of(batch) for batch in batches]

    with case.listener.task(COMPARING, len(batches), "batches") as task:
        with linearized(case.model, case.plan):
            reference = outputs(encoder)
        graph = outputs(OrtModel(case.rewritten, small=True).encode)
        parity = compare_batches(reference, graph, batches, gates)
        task.advance(len(batches))
    failures = parity.failures()
    if precision.name == "fp16":
        # The figures are those of the graph rounded as it says; the file itself must run too, where it can.
        unrounded = outputs(OrtModel(case.rewritten, rounded=False, small=True).encode)
        failures += _as_it_runs(compare_batches(reference, unrounded, batches, gates).failures())
    if precision.name != "fp32":
        # PyTorch's own run in the graph's precision: what that precision costs anyone.
        dummy_run(case.model)
        half = TorchEncoder(encoder_of(case.model, case.task, case.pooling, case.plan.probe))
        half.encoder.model = in_precision(case.model, precision.gates)
        with linearized(half.encoder.model, case.plan):
            own = compare_batches(reference, outputs(half), batches, gates)
        failures += parity.failures_against(own, OWN)

    def against(path: Path) -> list[str]:
        expected = outputs(OrtModel(path, small=True).encode)
        return compare_batches(expected, graph, batches, gates_for(UNMODIFIED)).failures()

    def lost() -> str | None:
        if failures and alone and not compare_batches(reference[:1], graph[:1], [ragged], gates).failures():
            return only_beyond(crossings)
        return str(first_divergence(case.model, case.plan, case.rewritten)) if failures else None

    names = ", ".join(o.output for o in parity.outputs)
    within = f"max relative difference {parity.worst:.2g} in {names}, within all {precision.gates} gates"
    found.check_parity([*failures, *_against_unmodified(case, against)], within, lost)
    found.checks += crossing_check(crossings)
    return EncoderParity(
        **vars(parity),
        precision=precision.name,
        pytorch_in_precision=own.outputs if own else None,
        crossings=crossings,
    )


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
