"""Run what is compared over the same rows, and compare: logits, caches, the outputs of an encoder.

Both run the same ragged batch: one prefill, then teacher-forced decode steps, each with its own real cache. They run
one after the other, and what they gave is compared when both are gone. Only real tokens are compared, never padding.
Rows that cross a length are batches of their own: of such a prefill the last logits are compared, and the cache is once
all steps are done. An encoder has outputs instead of steps.

For logits (or other vectors) a (reference) and b:

abs   |a - b|                          rel   |a - b| / max(|a|, rms of the token's a)
cosine of the vectors a and b          KL    KL(softmax a ‖ softmax b) in nats
top-1 the same most likely token; where they differ although the reference's best two lie closer
      than the gate's ``near_tie``, the token is a near-tie and is not counted against the graph

Keys and values are compared by |a - b| / max(|a|, rms of the head's vector), over the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32, F64
from nbl_export.batch.rows import Inputs, Outputs, real_positions
from nbl_export.errors import InputError
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.stream import KV, Stream
from nbl_export.verify.parity.figures import Figures, Gates, OutputParity, OutputsParity, Parity, StepParity

Rows = Sequence[NDArray[np.int32]]
# A cache, and which of its slots are no padding.
Kept = tuple[Sequence[KV], BOOL]
# Of a row that is a batch of its own: more logits of a long text would take gigabytes.
LAST = 64
COMPARING = "Comparing with PyTorch"
_PART = 1 << 21  # numbers that are compared together


@dataclass(frozen=True)
class Step:
    """What one pass gave: ``logits`` [vectors, vocab] and, where it is ``kept``, the cache after it."""

    logits: F32
    kept: Kept | None


@dataclass(frozen=True)
class Recorded:
    """What a stream gave, so that the next one is run when it is gone: the steps of each batch, the ragged one first.

    ``lengths`` are those of the ragged prompts; ``kv_layers`` are the layers of the caches, None without one.
    """

    kv_layers: tuple[int, ...] | None
    lengths: tuple[int, ...]
    batches: tuple[tuple[Step, ...], ...]

    @property
    def ragged(self) -> Recorded:
        """What was recorded of the ragged rows alone."""
        return Recorded(self.kv_layers, self.lengths, self.batches[:1])


# The logits of one pass, and what gives the cache after it.
Pass = tuple[F32, Callable[[], Kept]]


def record_passes(
    passes: Callable[[Rows], Iterable[Pass]],
    kv_layers: tuple[int, ...] | None,
    rows: Rows,
    decode_steps: int,
    listener: Listener | None = None,
    alone: Rows = (),
    title: str = COMPARING,
) -> Recorded:
    """What ``passes`` gives for each batch, a prefill and ``decode_steps`` steps: see :func:`record`."""
    batches: list[tuple[Step, ...]] = []
    with (listener or Silent()).task(title, (1 + len(alone)) * (decode_steps + 1), "steps") as task:
        for batch in (rows, *([row] for row in alone)):
            whole, steps = not batches, list[Step]()
            for logits, cache in passes(batch):
                kept = cache() if whole or len(steps) == decode_steps else None
                steps.append(Step(logits if whole else logits[-LAST:].copy(), kept))
                task.advance(1)
            batches.append(tuple(steps))
    return Recorded(kv_layers, tuple(len(row) - decode_steps for row in rows), tuple(batches))


def record(
    stream: Stream,
    rows: Rows,
    decode_steps: int,
    listener: Listener | None = None,
    alone: Rows = (),
    title: str = COMPARING,
) -> Recorded:
    """Run ``stream`` over ``rows``: all but the last ``decode_steps`` tokens prefilled, the rest decoded.

    ``rows`` are token ids of different lengths, each longer than ``decode_steps``; each row of ``alone`` is run after
    them, by itself. The ``listener`` is told of each step, under this ``title``.
    """

    def passes(batch: Rows) -> Iterator[Pass]:
        if alone:
            stream.reserve(max(map(len, batch)))
        yield stream.prefill([row[: len(row) - decode_steps] for row in batch]), stream.cache
        for step in range(-decode_steps, 0):
            yield stream.decode([int(row[step]) for row in batch]), stream.cache

    return record_passes(passes, stream.kv_layers, rows, decode_steps, listener, alone, title)


def compare(reference: Recorded, candidate: Recorded, gates: Gates) -> Parity:
    """The figures of ``candidate`` against ``reference``, of the same rows.

    Raises :class:`InputError` if the two do not cache the same layers. Of a candidate that keeps no cache only the
    logits are compared.
    """
    layers = (reference.kv_layers or ()) if candidate.kv_layers is not None else ()
    if layers != (candidate.kv_layers or ()):
        raise InputError(
            f"The graph caches layers {candidate.kv_layers}, the plan leaves {reference.kv_layers}: "
            "it was rewritten by another plan."
        )
    steps = []
    both = (zip(*side.batches, strict=True) for side in (reference, candidate))
    for number, (a, b) in enumerate(zip(*both, strict=True)):
        x, y = (np.concatenate([step.logits for step in side]) for side in (a, b))
        kv = _compare_caches(list(zip(a, b, strict=True)), layers)
        steps.append(StepParity(**vars(compare_vectors(x, y, gates.near_tie)), step=number, **kv))
    return Parity(reference.lengths, tuple(steps), gates)


def _compare_caches(pairs: Sequence[tuple[Step, Step]], layers: Sequence[int]) -> dict[str, Any]:
    """The figures of a :class:`StepParity` that are of the cache."""

    def found(max_abs: float, max_rel: float, mean_rel: float, layer: int | None) -> dict[str, Any]:
        return {
            "kv_max_abs": max_abs,
            "kv_max_rel": max_rel,
            "kv_mean_rel": mean_rel,
            "kv_worst_layer": layer,
        }

    worst_abs, worst_rel, worst_layer, means = 0.0, 0.0, None, []
    for a, b in pairs:
        if a.kept is None or b.kept is None or not b.kept[0]:  # a candidate without a cache
            continue
        (cache, real), (other, other_real) = a.kept, b.kept
        if len(cache) != len(other):
            return found(np.inf, np.inf, np.inf, None)
        # After keys and values each state by itself.
        places = [*layers, *[None] * (len(cache) - len(layers))]
        for layer, sides_a, sides_b in zip(places, cache, other, strict=True):
            for x, y in zip(sides_a, sides_b, strict=True):
                u, v = _states(x, y) if layer is None else (_tokens(x, real), _tokens(y, other_real))
                if u is None or v is None or u.shape != v.shape:
                    return found(np.inf, np.inf, np.inf, layer)
                difference = np.abs(u - v)
                relative = difference / np.maximum(np.maximum(np.abs(u), rms(u)), 1e-12)
                # NaN compares with nothing; as infinity it is the worst there is.
                most, most_rel = (float(np.nan_to_num(d.max(), nan=np.inf)) for d in (difference, relative))
                means.append(float(relative.mean()))
                worst_abs = max(worst_abs, most)
                if most_rel > worst_rel:
                    worst_rel, worst_layer = most_rel, layer
    return found(worst_abs, worst_rel, float(np.mean(means)) if means else 0.0, worst_layer)


def _states(a: NDArray[Any], b: NDArray[Any]) -> tuple[F64, F64]:
    """Two states as [rows, values]; a convolution may keep one more column than it needs, the oldest."""
    columns = min(a.shape[-1], b.shape[-1])
    flat = (state[..., -columns:].reshape(len(state), -1).astype(np.float64) for state in (a, b))
    return next(flat), next(flat)


def _tokens(cache: NDArray[Any], real: BOOL) -> F64 | None:
    """The [tokens, heads, head_dim] that are no padding, or None if the cache is not of that size."""
    if (cache.shape[0], cache.shape[2]) != real.shape:
        return None
    return np.moveaxis(cache, 1, 2)[real].astype(np.float64)


# encoders -----------------------------------------------------------------------------------------


def compare_batches(
    reference: Sequence[Outputs], candidate: Sequence[Outputs], batches: Sequence[Inputs], gates: Gates
) -> OutputsParity:
    """Every output of the two encoders over ``batches``, of which the first has the rows that are said.

    One that is missing, or of another shape, differs without bound.
    """
    found = []
    for name in reference[0]:
        pairs = []
        for a, b, inputs in zip(reference, candidate, batches, strict=True):
            x, y = (vectors(v, inputs) for v in (a[name], b.get(name, np.full_like(a[name], np.nan))))
            pairs.append((x, y if x.shape == y.shape else np.full_like(x, np.nan)))
        x, y = (np.concatenate(side) for side in zip(*pairs, strict=True))
        figures = compare_vectors(x, y, gates.near_tie)
        found.append(OutputParity(**vars(figures), output=name, width=x.shape[1]))
    inputs = batches[0]
    lengths = [int(n) for n in real_positions(inputs, 0).sum(axis=1) if n]
    return OutputsParity(len(next(iter(inputs.values()))), tuple(lengths), tuple(found), gates)


def vectors(output: F32, inputs: Inputs) -> F32:
    """An output as [vectors, d]: of every real token, or of every row."""
    if output.ndim == 3:
        return output[real_positions(inputs, output.shape[1])]
    return output.reshape(len(output), -1)


# vectors ------------------------------------------------------------------------------------------


def compare_vectors(a: F32, b: F32, near_tie: float) -> Figures:
    """The figures of ``b`` against the reference ``a``, each [vectors, d]."""
    difference, relative = (np.empty(a.shape, dtype=np.float64) for _ in range(2))
    kl, cosine = (np.empty(len(a), dtype=np.float64) for _ in range(2))
    same, tie = (np.empty(len(a), dtype=np.bool_) for _ in range(2))
    # Logits of a large vocabulary take 1 MiB a token in float64, several times over.
    each = max(1, _PART // max(1, a.shape[-1]))
    for at in (slice(start, start + each) for start in range(0, len(a), each)):
        x, y = a[at].astype(np.float64), b[at].astype(np.float64)
        difference[at] = np.abs(x - y)
        relative[at] = _quotient(difference[at], np.maximum(np.abs(x), rms(x)), np.inf)
        log_p, log_q = log_softmax(x), log_softmax(y)
        kl[at] = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
        norms = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
        # Two vectors of zeros are equal; one of zeros has no direction, which no gate passes.
        cosine[at] = np.where(
            (norms[0] == 0) & (norms[1] == 0), 1.0, _quotient(np.sum(x * y, axis=-1), norms[0] * norms[1])
        )
        # A single score has no second one.
        best_two = np.partition(x, -2, axis=-1)[:, -2:] if x.shape[1] > 1 else np.repeat(x, 2, axis=1)
        same[at] = x.argmax(axis=-1) == y.argmax(axis=-1)
        tie[at] = ~same[at] & (best_two[:, 1] - best_two[:, 0] < near_tie)
    return Figures(
        tokens=len(a),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        p99_abs=float(np.quantile(difference, 0.99)),
        max_rel=float(np.max(relative)),
        mean_rel=float(relative.mean()),
        p99_rel=float(np.quantile(relative, 0.99)),
        min_cosine=float(np.min(cosine)),
        # Rounding can make a vanishing KL negative.
        max_kl=float(np.maximum(kl, 0).max()),
        top1=float((same | tie).mean()),
        near_ties=int(tie.sum()),
    )


def _quotient(a: F64, b: F64, of_nothing: float = 0.0) -> F64:
    """a / b; 0 for nothing of anything, ``of_nothing`` for something of nothing; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        found: F64 = np.where(b == 0, np.where(a == 0, 0.0, of_nothing), a / np.where(b == 0, 1.0, b))
    return np.where(np.isnan(a) | np.isnan(b), np.nan, found)


def rms(x: F64) -> F64:
    """Root mean square over the last axis, which is kept."""
    found: F64 = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    return found


def log_softmax(x: F64) -> F64:
    """Over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    result: F64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
