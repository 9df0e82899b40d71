"""All measurements of a rewritten decoder in order: parity, method loss, speed, engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbl_export.checks import Check
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import load_graph
from nbl_export.models.layers import positions
from nbl_export.models.routers import Routers
from nbl_export.models.weights import resident, room
from nbl_export.rewrite.routers import routers
from nbl_export.runtime.ort import Watch, ort_stream
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.crossing import crossing_check, only_beyond, parity_text
from nbl_export.verify.engines import measure_engines
from nbl_export.verify.loss.decoder import measure_method_loss
from nbl_export.verify.loss.figures import MethodLoss
from nbl_export.verify.loss.gate import bound_checks
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
from nbl_export.verify.parity.decoder import COMPARING, Recorded, compare, ragged, record
from nbl_export.verify.parity.figures import UNMODIFIED, DecoderParity, Gates, Parity, gates_for
from nbl_export.verify.parity.localize import first_divergence
from nbl_export.verify.parity.media import media_parity, rows_with_media
from nbl_export.verify.parity.noise import rounding_noise
from nbl_export.verify.parity.own import OWN, pytorch_in_precision
from nbl_export.verify.parity.reference import record_pytorch
from nbl_export.verify.parity.routing import (
    Reference,
    Told,
    passes,
    rounding,
    routing_failures,
    routing_of,
    told_by,
    watched,
)
from nbl_export.verify.parity.unmodified import against_unmodified, kept_cache
from nbl_export.verify.speed.pair import Pair
from nbl_export.verify.speed.values import Speed


def measure_decoder(case: DecoderCase) -> Measurement:
    """Everything that is asked of a rewritten decoder, and of its engines if there are any."""
    contexts, notes = fitting_contexts(positions(case.model), case.settings.contexts, room=1)
    with resident(case.model, room(case.model)):
        parity, loss = clocked(lambda: measure_parity(case)), clocked(lambda: _loss(case))
    return put_together(
        parity,
        loss,
        clocked(lambda: _speed(case, contexts, notes)),
        *measure_engines(case, contexts),
    )


def measure_parity(case: DecoderCase) -> FoundParity[DecoderParity]:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, steps = case.precision, case.settings.decode_steps
    gates, cached = gates_for(precision.gates), not interface_of(case.graph).cacheless
    rows, alone, crossings = parity_text(case, cached)
    routed = not precision.quantized and bool(routers(load_graph(case.rewritten)))
    torch = Reference(
        lambda told: record_pytorch(case.model, case.plan, rows, steps, cached, alone, told, case.listener),
        passes(rows, steps, cached, alone) if routed else None,
    )
    graph, told = _chosen(case, rows, cached, alone)
    reference, as_told = torch.like(told)
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
        moved = rounding(as_told, half)
        routing = routing_of(torch.own, as_told, moved)
        failures += routing_failures(routing)
        if unrounded:
            failures += routing_failures(routing_of(torch.own, unrounded, moved))
    against = against_unmodified(
        case.baseline, case.rewritten, case.plan, lambda path: unlike(case, path, rows, graph, alone)
    )
    section = DecoderParity(
        **vars(parity),
        precision=precision.name,
        rounding_noise=noise,
        base_graph=base.steps if base else None,
        pytorch_in_precision=own.steps if own else None,
        crossings=crossings,
        routing=routing,
    )
    over = f"a prefill and {steps} decode steps"
    within = f"max |Δlogit| {parity.worst:.2g} over {over}, within all {precision.gates} gates"
    beyond = (
        bool(failures) and bool(alone) and not compare(ragged(reference), ragged(graph), gates).failures()
    )
    lost = (lambda: _where_lost(case, parity, noise)) if failures and not beyond else (lambda: None)
    if beyond:
        lost = partial(only_beyond, crossings)
    found = judged(section, [*failures, *against], within, lost)
    return replace(found, checks=(*found.checks, *crossing_check(crossings), *_media_check(case, gates)))


def _media_check(case: DecoderCase, gates: Gates) -> tuple[Check, ...]:
    """The verdict on texts with images and sounds, of a graph that reads embeddings and was calibrated on some."""
    media, embeds = case.text.media, interface_of(case.graph).embedding is not None
    rows = rows_with_media(case.text.heldout) if media is not None and embeds else []
    if media is None or not rows:
        return ()
    if layers := media.later.shape[1]:
        lacks = f"the model adds features of its images after its first {layers} layers (deepstack)"
        return (Check("parity with media", "failed", f"{lacks}, for which the graph has no inputs"),)
    parity = media_parity(case.model, case.plan, case.rewritten, rows, media, gates, case.listener)
    if failures := parity.failures():
        return (Check("parity with media", "failed", "; ".join(failures)),)
    texts = f"{len(rows)} text{'s' if len(rows) > 1 else ''} with images or sounds"
    within = f"max |Δlogit| {parity.worst:.2g} over {texts}"
    return (Check("parity with media", "passed", f"{within}, within all {case.precision.gates} gates"),)


def unlike(
    case: DecoderCase,
    reference: Path,
    rows: Sequence[NDArray[np.int32]],
    graph: Recorded | None = None,
    alone: Sequence[NDArray[np.int32]] = (),
) -> list[str]:
    """The gates that the rewritten graph fails against the unmodified one with the linear layers put in.

    ``graph`` is what the rewritten graph gave for ``rows`` and those ``alone``, if it is known.
    """
    title = "Running the base graph"
    expected = kept_cache(_recorded(case, reference, rows, alone=alone, title=title), case.plan)
    found = graph or _recorded(case, case.rewritten, rows, alone=alone)
    return compare(expected, found, gates_for(UNMODIFIED)).failures()


def _recorded(
    case: DecoderCase,
    path: Path,
    rows: Sequence[NDArray[np.int32]],
    rounded: bool = True,
    alone: Sequence[NDArray[np.int32]] = (),
    watch: Watch | None = None,
    title: str = COMPARING,
) -> Recorded:
    """What the graph at ``path`` gives for ``rows``; its session is closed when this returns."""
    stream = ort_stream(path, max(map(len, rows)), rounded=rounded, small=True, watch=watch)
    return record(stream, rows, case.settings.decode_steps, case.listener, alone, title)


def _chosen(
    case: DecoderCase,
    rows: Sequence[NDArray[np.int32]],
    cached: bool,
    alone: Sequence[NDArray[np.int32]],
    rounded: bool = True,
) -> tuple[Recorded, Told | None]:
    """What the rewritten graph gives for ``rows`` and those ``alone``, and its choices of experts, if it has any."""
    with watched(case.rewritten) as (path, watch):
        found = _recorded(case, path, rows, rounded=rounded, alone=alone, watch=watch)
    if watch is None:
        return found, None
    return found, told_by(case.rewritten, watch, rows, case.settings.decode_steps, cached, alone)


def _where_lost(case: DecoderCase, parity: Parity, noise: float) -> str:
    first = first_divergence(case.model, case.plan, case.rewritten)
    if first.layer is None and noise > parity.gates.max_abs_logit / 4:
        return (
            "every attention layer agrees, but the linearized PyTorch model's own logits move by "
            f"{noise:.1e} when its embeddings change in the last bit: this plan amplifies rounding; "
            "try other layers or another criterion"
        )
    return str(first)


def _loss(case: DecoderCase) -> Found[MethodLoss]:
    text = case.text
    found = method_loss(
        case,
        lambda: measure_method_loss(
            case.model, case.plan, text.heldout, text.heldout_document, case.listener
        ),
    )
    loss = found.section
    return replace(found, checks=(*found.checks, *bound_checks(loss, case.settings.bound))) if loss else found


def _speed(case: DecoderCase, contexts: Sequence[int], notes: tuple[str, ...]) -> Found[Speed]:
    return timed(case, notes, lambda baseline: Pair(baseline, case.rewritten), contexts)
