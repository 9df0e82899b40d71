"""Measure a rewritten decoder: parity, method loss, speed, engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import load_graph
from nbl_export.models.layers import positions
from nbl_export.models.routers import Routers
from nbl_export.models.weights import resident, room
from nbl_export.rewrite.routers import routers
from nbl_export.runtime.ort import Watch, ort_stream
from nbl_export.verify.case import DecoderCase, Rows, crossing_check, only_beyond, parity_text
from nbl_export.verify.engines import measure_engines
from nbl_export.verify.loss import loss_checks, measure_method_loss
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.parity.decoder import COMPARING, Recorded, compare, ragged, record
from nbl_export.verify.parity.figures import UNMODIFIED, DecoderParity, Gates, Parity, gates_for
from nbl_export.verify.parity.media import media_parity, rows_with_media
from nbl_export.verify.parity.pytorch import OWN, pytorch_in_precision, record_pytorch, rounding_noise
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
from nbl_export.verify.parity.unmodified import against_unmodified, first_divergence, kept_cache
from nbl_export.verify.speed.pair import fitting_contexts, verify_speed


def measure_decoder(case: DecoderCase) -> Measurement:
    """Everything that is asked of a rewritten decoder, and of its engines if there are any."""
    found, text = Measurement(), case.text
    contexts = fitting_contexts(found, positions(case.model), case.settings.contexts, room=1)
    with resident(case.model, room(case.model)):
        with found.clock():
            found.parity = measure_parity(case, found)
        if case.settings.quality:
            with found.clock():
                loss = measure_method_loss(
                    case.model, case.plan, text.heldout, text.heldout_document, case.listener
                )
                found.method_loss = loss
                found.checks += loss_checks(loss, case.settings.bound)
        else:
            found.check("method loss", "skipped", "--no-quality")
    with found.clock():
        found.speed = verify_speed(case, found, contexts)
    measure_engines(case, contexts, found)
    return found


def measure_parity(case: DecoderCase, found: Measurement) -> DecoderParity:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, steps = case.precision, case.settings.decode_steps
    gates, cached = gates_for(precision.gates), not interface_of(case.graph).cacheless
    rows, alone, crossings = parity_text(case, cached)
    routed = not precision.quantized and bool(routers(load_graph(case.rewritten)))
    torch = Reference(
        lambda told: record_pytorch(case.model, case.plan, rows, steps, cached, alone, told, case.listener),
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
        said = compare(expected, as_it_runs, gates).failures()
        failures += [f"as onnxruntime runs it, {failure}" for failure in said]
    noise = rounding_noise(case.model, rows, case.plan, listener=case.listener)
    base = own = half = None
    if precision.quantized and case.baseline is not None:
        # What the quantization costs the unmodified model is not the rewrite's to answer for.
        original = record_pytorch(case.model, None, rows, steps, cached, alone, listener=case.listener)
        base = compare(original, _recorded(case, case.baseline, rows, alone=alone), gates)
        failures += parity.failures_against(base, "the unmodified graph's own")
    elif not precision.quantized and precision.name != "fp32":
        half = as_told and Routers(as_told.real, as_told.told)
        own = pytorch_in_precision(
            precision, case.model, case.plan, rows, steps, cached, reference, alone, half, case.listener
        )
        failures += parity.failures_against(own, OWN)
    routing = None
    if torch.own and as_told:
        moved = moved_by_rounding(as_told, half)
        routing = routing_of(torch.own, as_told, moved)
        failures += routing_failures(routing)
        if unrounded:
            failures += routing_failures(routing_of(torch.own, unrounded, moved))
    against = against_unmodified(
        case.baseline, case.rewritten, case.plan, lambda path: unlike(case, path, rows, graph, alone)
    )

    def lost() -> str | None:
        if failures and alone and not compare(ragged(reference), ragged(graph), gates).failures():
            return only_beyond(crossings)
        return _where_lost(case, parity, noise) if failures else None

    within = (
        f"max |Δlogit| {parity.worst:.2g} over a prefill and {steps} decode steps, within all "
        f"{precision.gates} gates"
    )
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
    case: DecoderCase,
    reference: Path,
    rows: Rows,
    graph: Recorded | None = None,
    alone: Sequence[NDArray[np.int32]] = (),
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
    alone: Sequence[NDArray[np.int32]] = (),
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
