"""Parity of a decoder: does the graph compute what PyTorch computes with the same plan?

Both run the same ragged batch: one prefill, then teacher-forced decode steps, each with its own real cache. They run
one after the other, and what they gave is compared when both are gone. Only real tokens are compared, never padding.
Rows that cross a length are batches of their own: of such a prefill the last logits are compared, and the cache is once
all steps are done.
The figures of the logits: :mod:`.vectors`.
Keys and values are compared by |a - b| / max(|a|, rms of the head's vector), over the whole cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32, F64
from nbl_export.errors import InputError
from nbl_export.progress import Listener, Silent, Task
from nbl_export.runtime.stream import KV, Stream
from nbl_export.verify.parity.figures import Gates, Parity, StepParity
from nbl_export.verify.parity.vectors import compare_vectors, rms

# Of a row that is a batch of its own: more logits of a long text would take gigabytes.
LAST = 64
# A cache, and which of its slots are no padding.
Kept = tuple[Sequence[KV], BOOL]
COMPARING = "Comparing with PyTorch"


@dataclass(frozen=True)
class Step:
    """What a stream gave in one pass: ``logits`` [vectors, vocab], and the caches that are kept after it."""

    logits: F32
    caches: tuple[Kept, ...]


@dataclass(frozen=True)
class Recorded:
    """What a stream gave for ragged rows, so that the next one is run when it is gone.

    ``lengths`` are those of the ragged prompts; ``kv_layers`` are the layers of its cache, None without one.
    """

    kv_layers: tuple[int, ...] | None
    lengths: tuple[int, ...]
    steps: tuple[Step, ...]


def record(
    stream: Stream,
    rows: Sequence[NDArray[np.int32]],
    decode_steps: int,
    listener: Listener | None = None,
    alone: Sequence[NDArray[np.int32]] = (),
    title: str = COMPARING,
) -> Recorded:
    """Run ``stream`` over ``rows``: all but the last ``decode_steps`` tokens prefilled, the rest decoded.

    ``rows`` are token ids of different lengths, each longer than ``decode_steps``; each row of ``alone`` is run after
    them, by itself. The ``listener`` is told of each step, under this ``title``.
    """
    batches = [list(rows), *([row] for row in alone)]
    with (listener or Silent()).task(title, len(batches) * (decode_steps + 1), "steps") as task:
        found: list[Recorded] = []
        for batch in batches:
            if alone:
                stream.reserve(max(map(len, batch)))
            found.append(_record(stream, batch, decode_steps, task, whole=not found))
    return joined(found)


def _record(
    stream: Stream, rows: Sequence[NDArray[np.int32]], decode_steps: int, task: Task, whole: bool
) -> Recorded:
    prompts = [row[: len(row) - decode_steps] for row in rows]
    steps = []
    for step in range(decode_steps + 1):
        if step:
            taught = [int(row[len(row) - decode_steps + step - 1]) for row in rows]
            logits = stream.decode(taught)
        else:
            logits = stream.prefill(prompts)
        kept = (stream.cache(),) if whole or step == decode_steps else ()
        steps.append(Step(logits if whole else logits[-LAST:].copy(), kept))
        task.advance(1)
    return Recorded(stream.kv_layers, tuple(map(len, prompts)), tuple(steps))


def joined(records: Sequence[Recorded]) -> Recorded:
    """The records of several batches as one: of all but the first only what is compared of them."""
    first, *others = records
    if not others:
        return first
    steps = []
    for number, parts in enumerate(zip(*(one.steps for one in records), strict=True)):
        logits = np.concatenate([parts[0].logits, *(part.logits[-LAST:] for part in parts[1:])])
        whole = parts if number == len(first.steps) - 1 else parts[:1]
        steps.append(Step(logits, tuple(cache for part in whole for cache in part.caches)))
    return Recorded(first.kv_layers, first.lengths, tuple(steps))


def ragged(recorded: Recorded) -> Recorded:
    """What was recorded of the ragged rows alone."""
    rows = len(recorded.lengths)
    vectors = [sum(recorded.lengths), *[rows] * (len(recorded.steps) - 1)]
    steps = (Step(s.logits[:n], s.caches[:1]) for s, n in zip(recorded.steps, vectors, strict=True))
    return Recorded(recorded.kv_layers, recorded.lengths, tuple(steps))


def compare(reference: Recorded, candidate: Recorded, gates: Gates) -> Parity:
    """The figures of ``candidate`` against ``reference``, of the same rows.

    Raises :class:`InputError` if the two do not cache the same layers. Of a candidate that keeps no cache only the
    logits are compared.
    """
    layers = _compared_layers(reference, candidate)
    steps = []
    for number, (a, b) in enumerate(zip(reference.steps, candidate.steps, strict=True)):
        logits = compare_vectors(a.logits, b.logits, gates.near_tie)
        kv = _compare_kv(a.caches, b.caches, layers)
        steps.append(StepParity(**vars(logits), step=number, **kv))
    return Parity(reference.lengths, tuple(steps), gates)


def _compared_layers(reference: Recorded | Stream, candidate: Recorded | Stream) -> tuple[int, ...]:
    layers = (reference.kv_layers or ()) if candidate.kv_layers is not None else ()
    if layers != (candidate.kv_layers or ()):
        raise InputError(
            f"The graph caches layers {candidate.kv_layers}, the plan leaves {reference.kv_layers}: "
            "it was rewritten by another plan."
        )
    return layers


def compare_streams(
    reference: Stream,
    candidate: Stream,
    rows: Sequence[NDArray[np.int32]],
    decode_steps: int,
    gates: Gates,
    listener: Listener | None = None,
    alone: Sequence[NDArray[np.int32]] = (),
) -> Parity:
    """Run both over ``rows``, and over each row ``alone``, one after the other, and compare what they gave."""
    _compared_layers(reference, candidate)
    expected = record(reference, rows, decode_steps, alone=alone)
    return compare(expected, record(candidate, rows, decode_steps, listener, alone), gates)


def _compare_kv(
    reference: Sequence[Kept], candidate: Sequence[Kept], layers: Sequence[int]
) -> dict[str, Any]:
    """The figures of a :class:`StepParity` that are of the cache."""
    worst_abs, worst_rel, worst_layer = 0.0, 0.0, None
    means = []
    for (a, real_a), (b, real_b) in zip(reference, candidate, strict=True):
        if not b:  # a candidate without a cache
            continue
        # After keys and values each state by itself.
        places = [*layers, *[None] * (len(a) - len(layers))]
        if len(a) != len(b):
            return _of_cache(float("inf"), float("inf"), float("inf"), None)
        for layer, pair_a, pair_b in zip(places, a, b, strict=True):
            for x, y in zip(pair_a, pair_b, strict=True):
                u, v = _flat_states(x, y) if layer is None else (_real(x, real_a), _real(y, real_b))
                if u is None or v is None or u.shape != v.shape:
                    return _of_cache(float("inf"), float("inf"), float("inf"), layer)
                difference = np.abs(u - v)
                relative = difference / np.maximum(np.maximum(np.abs(u), rms(u)), 1e-12)
                # NaN compares with nothing; as infinity it is the worst there is.
                largest, largest_rel = (
                    float(np.nan_to_num(np.max(d), nan=np.inf)) for d in (difference, relative)
                )
                means.append(float(relative.mean()))
                worst_abs = max(worst_abs, largest)
                if largest_rel > worst_rel:
                    worst_rel, worst_layer = largest_rel, layer
    return _of_cache(worst_abs, worst_rel, float(np.mean(means)) if means else 0.0, worst_layer)


def _of_cache(max_abs: float, max_rel: float, mean_rel: float, layer: int | None) -> dict[str, Any]:
    return {"kv_max_abs": max_abs, "kv_max_rel": max_rel, "kv_mean_rel": mean_rel, "kv_worst_layer": layer}


def _flat_states(a: NDArray[Any], b: NDArray[Any]) -> tuple[F64, F64]:
    """Two states as [rows, values]; a convolution may keep one more column than it needs, the oldest."""
    columns = min(a.shape[-1], b.shape[-1])
    flat = (state[..., -columns:].reshape(len(state), -1).astype(np.float64) for state in (a, b))
    return next(flat), next(flat)


def _real(cache: NDArray[Any], real: BOOL) -> F64 | None:
    """The [tokens, heads, head_dim] that are no padding, or None if the cache is not of that size."""
    if (cache.shape[0], cache.shape[2]) != real.shape:
        return None
    return np.moveaxis(cache, 1, 2)[real].astype(np.float64)
