"""Measure a rewritten decoder or encoder: parity, method loss, speed, engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import (
    EMBEDDINGS,
    F32,
    FIRST,
    PIXELS,
    POSITIONS,
    TOKENS,
    Inputs,
    Outputs,
    are_media,
    batch_of_rows,
)
from nbl_export.graph.interface import interface_of
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized, sweep, version_of
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import encoder_of
from nbl_export.models.layers import positions
from nbl_export.models.media_tokens import MediaTokens, seeing
from nbl_export.models.weights import device_of, in_precision, resident, room
from nbl_export.progress import Listener
from nbl_export.rewrite.routers import is_routed
from nbl_export.runtime.ort import OrtModel, ort_stream
from nbl_export.runtime.session import run_session
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
from nbl_export.verify.parity.compare import (
    COMPARING,
    LAST,
    Recorded,
    Text,
    compare,
    compare_batches,
    compare_vectors,
    record,
    stepped,
)
from nbl_export.verify.parity.figures import (
    UNMODIFIED,
    DecoderParity,
    EncoderParity,
    Gates,
    Likeness,
    MethodLoss,
    Parity,
    StepParity,
    gates_for,
)
from nbl_export.verify.parity.pytorch import OWN, Reference, choices_as_outputs, choices_of, rounding_noise
from nbl_export.verify.parity.unmodified import differences, first_divergence, kept_cache
from nbl_export.verify.speed.candidates import EncoderPass
from nbl_export.verify.speed.pair import fitting_contexts, verify_speed
from nbl_export.verify.speed.values import ENCODE

I32 = NDArray[np.int32]
# Ragged on purpose, and few enough that their padding is seen to be hidden.
_LENGTHS = (64, 41, 23, 9)
_ROWS, _AFTER = 2, 32  # rows with images that are compared, and how many tokens after the first image of each


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
            asked = (case.model, case.plan, text.heldout, text.heldout_document, case.listener)
            _measure_loss(case, found, lambda: measure_method_loss(*asked))
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
        asked = (encoder, case.plan, case.heldout, case.unit, case.listener)
        _measure_loss(case, found, lambda: measure_likeness(*asked))
    with found.clock():
        timed = {} if case.why_not_timed else _timed(case, found)
        found.speed = verify_speed(
            case,
            found,
            list(timed),
            (ENCODE,),
            lambda model, tokens, _batch: EncoderPass(model, timed[tokens]),
        )
    return found


def _measure_loss(case: Case, found: Measurement, measured: Callable[[], MethodLoss | Likeness]) -> None:
    with found.clock():
        if case.settings.quality:
            found.method_loss = measured()
            found.checks += loss_checks(found.method_loss, case.settings.bound)
        else:
            found.check("method loss", "skipped", "--no-quality")


def _against_unmodified(case: Case, compared: Callable[[Path], Sequence[str]]) -> list[str]:
    """What is wrong with the rewritten graph beside the unmodified one, if that is there."""
    if case.baseline is None:
        return []
    return differences(case.baseline, case.rewritten, case.plan, case.tensors, compared)


def _where_lost(case: Case, noise: float = 0.0, most: float = 0.0) -> str:
    """Where what differs begins; ``noise`` of a decoder's logits may be ``most``."""
    first = first_divergence(case.model, case.plan, case.rewritten)
    if first is None and noise > most:
        return (
            "every attention layer agrees, but the linearized PyTorch model's own logits move by "
            f"{noise:.1e} when its embeddings change in the last bit: this plan amplifies rounding; "
            "try other layers or another criterion"
        )
    agrees = (
        "every attention layer agrees: the difference arises after the last one (MLP, final norm or head)"
    )
    return first or agrees


# decoders -----------------------------------------------------------------------------------------


def decoder_parity(case: DecoderCase, found: Measurement) -> DecoderParity:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, listener = case.precision, case.listener
    text, crossings = parity_text(case, cached=not interface_of(case.graph).cacheless)
    reference = Reference(case.model, case.plan, text, precision, listener, is_routed(case.graph))
    run = partial(record_graph, case, case.rewritten, text, watched=True)
    graph = run()
    # The figures are those of a graph rounded as it says; a float16 file itself must run too.
    judged = reference.judge(
        graph,
        partial(record_graph, case, case.baseline, text, watched=True) if case.baseline else None,
        partial(run, rounded=False) if precision.name == "fp16" else None,
    )
    parity, failures = judged.parity, judged.failures
    noise = rounding_noise(case.model, text.rows, case.plan, listener)
    against = _against_unmodified(case, lambda path: unlike(case, path, text, graph))

    def lost() -> str | None:
        ours, theirs = (replace(side, batches=side.batches[:1]) for side in (reference.recorded, graph))
        if failures and text.alone and not compare(ours, theirs, reference.gates).failures():
            return only_beyond(crossings)
        return _where_lost(case, noise, reference.gates.max_abs_logit / 4) if failures else None

    prefill = f"a prefill and {text.steps} decode steps, within all {precision.gates} gates"
    within = f"max |Δlogit| {parity.worst:.2g} over {prefill}"
    found.judge_parity([*failures, *against], within, lost)
    found.checks += crossing_check(crossings)
    _check_media(case, reference.gates, found)
    return DecoderParity(
        **vars(parity),
        precision=precision.name,
        rounding_noise=noise,
        base_graph=judged.base.steps if judged.base else None,
        pytorch_in_precision=judged.own.steps if judged.own else None,
        crossings=crossings,
        routing=judged.routing,
    )


def record_graph(
    case: DecoderCase,
    path: Path,
    text: Text,
    title: str = COMPARING,
    rounded: bool = True,
    watched: bool = False,
) -> Recorded:
    """What the graph at ``path`` gives for ``text``; its session is closed when this returns.

    Its choices of experts are in it if they are ``watched``.
    """
    with choices_as_outputs(path) if watched else nullcontext((path, None)) as (shown, watch):
        stream = ort_stream(shown, max(map(len, text.rows)), rounded=rounded, small=True, watch=watch)
        found = record(stepped(stream, text), stream.kv_layers, text, case.listener, title)
    return replace(found, choices=choices_of(path, watch, text)) if watch else found


def unlike(case: DecoderCase, reference: Path, text: Text, graph: Recorded | None = None) -> list[str]:
    """The gates that the rewritten graph fails against the unmodified one with the linear layers put in.

    ``graph`` is what the rewritten graph gave for ``text``, if it is known.
    """
    expected = record_graph(case, reference, text, "Running the base graph")
    found = graph or record_graph(case, case.rewritten, text)
    return compare(kept_cache(expected, case.plan), found, gates_for(UNMODIFIED)).failures()


# images and sounds ---------------------------------------------------------------------------------

# A graph that reads embeddings is given those of images and sounds among those of its tokens. PyTorch and the graph run
# the same rows, each by itself. The graph attends to earlier tokens only; so does PyTorch here, also where a model lets
# the tokens of an image see each other both ways.


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
    found.judge(name, parity.failures(), within)


def rows_with_media(heldout: I32) -> list[I32]:
    """The first rows of ``heldout`` that have images or sounds, each up to a while after its first one."""
    found = []
    for row in heldout:
        there = np.flatnonzero(are_media(row))
        if len(there):
            after = there[0] + int(np.argmin(np.append(are_media(row[there[0] :]), False)))
            found.append(row[: after + _AFTER])
    return found[:_ROWS]


def media_parity(
    model: torch.nn.Module,
    plan: Plan,
    graph: Path,
    rows: Sequence[I32],
    media: MediaTokens,
    gates: Gates,
    listener: Listener | None = None,
) -> Parity:
    """The last logits of each of ``rows`` by the ``graph`` against ``model`` with ``plan``, a step each."""
    causal = replace(media, both_ways=np.zeros(1, np.int32))
    ids = [torch.from_numpy(row.astype(np.int64)).to(device_of(model)) for row in rows]
    with seeing(model, causal):
        by_pytorch = sweep(model, ids, [version_of(model, plan)], plan.fit_input, listener=listener)
        expected = [logits[-LAST:].float().cpu().numpy() for _, _, logits in by_pytorch]
    decoder, steps = OrtModel(graph, small=True), []
    for number, (row, reference) in enumerate(zip(rows, expected, strict=True)):
        figures = compare_vectors(reference, _by_graph(decoder, row, causal), gates.near_tie)
        steps.append(StepParity(**vars(figures), step=number))
    return Parity(tuple(map(len, rows)), tuple(steps), gates)


def _by_graph(decoder: OrtModel, row: I32, media: MediaTokens) -> F32:
    ids = row.astype(np.int64)[None]
    there, embedding = are_media(ids), decoder.interface.embedding
    assert embedding is not None
    index = np.where(there, ids - FIRST, 0)
    # The embeddings of each layer are those of other tokens.
    given = dict(embedding(np.where(there, media.stand_in[index], ids)))
    given[EMBEDDINGS] = embedding(np.where(there, 0, ids))[EMBEDDINGS]
    given[EMBEDDINGS][there] = media.features[index[there]]
    places = media.positions(torch.from_numpy(ids)).numpy()
    inputs = {**given, POSITIONS: places if len(places) > 1 else places[0]}
    feeds = decoder.interface.row(inputs, decoder.cache_dtype)
    (logits,) = run_session(decoder.session, [decoder.interface.logits], feeds)
    return np.asarray(logits)[0, -LAST:]


# encoders -----------------------------------------------------------------------------------------


def encoder_parity(case: EncoderCase, encoder: TorchEncoder, found: Measurement) -> EncoderParity:
    """The graph in onnxruntime against PyTorch with the plan in place, by the gates of the graph's precision."""
    precision, ragged = case.precision, _batch(case)
    alone, crossings = crossing_batches(case, ragged)
    batches, gates, own = [ragged, *alone], gates_for(precision.gates), None
    with case.listener.task(COMPARING, len(batches), "batches") as task:
        with linearized(case.model, case.plan):
            reference = list(map(encoder, batches))
        graph: list[Outputs] = list(map(OrtModel(case.rewritten, small=True).encode, batches))
        parity = compare_batches(reference, graph, batches, gates)
        task.advance(len(batches))
    failures = parity.failures()
    if precision.name == "fp16":
        # The figures are those of the graph rounded as it says; the file itself must run too, where it can.
        unrounded = list(map(OrtModel(case.rewritten, rounded=False, small=True).encode, batches))
        wrong = compare_batches(reference, unrounded, batches, gates).failures()
        failures += [f"as onnxruntime runs it, {failure}" for failure in wrong]
    if precision.name != "fp32":
        # PyTorch's own run in the graph's precision: what that precision costs anyone.
        dummy_run(case.model)
        half = TorchEncoder(encoder_of(case.model, case.task, case.pooling, case.plan.probe))
        half.encoder.model = in_precision(case.model, precision.gates)
        with linearized(half.encoder.model, case.plan):
            own = compare_batches(reference, list(map(half, batches)), batches, gates)
        failures += parity.failures_against(own, OWN)

    def against(path: Path) -> list[str]:
        expected = list(map(OrtModel(path, small=True).encode, batches))
        return compare_batches(expected, graph, batches, gates_for(UNMODIFIED)).failures()

    def lost() -> str | None:
        if failures and alone and not compare_batches(reference[:1], graph[:1], [ragged], gates).failures():
            return only_beyond(crossings)
        return _where_lost(case) if failures else None

    names = ", ".join(o.output for o in parity.outputs)
    within = f"max relative difference {parity.worst:.2g} in {names}, within all {precision.gates} gates"
    found.judge_parity([*failures, *_against_unmodified(case, against)], within, lost)
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
