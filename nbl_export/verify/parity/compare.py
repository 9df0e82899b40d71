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

from nbl_export.batch import BOOL, F32, F64, I64, Inputs, Outputs, left_padded, one_more, real_positions
from nbl_export.errors import InputError
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.stream import KV, Stream
from nbl_export.verify.parity.figures import Figures, Gates, OutputParity, OutputsParity, Parity, StepParity

Rows = Sequence[NDArray[np.int32]]
# A cache, and which of its slots are no padding.
Kept = tuple[Sequence[KV], BOOL]
# The logits of one pass, and what gives the cache after it.
Pass = tuple[F32, Callable[[], Kept]]
# What each router of each pass has chosen.
Choices = list[list[I64 | None]]
# Of a row that is a batch of its own: more logits of a long text would take gigabytes.
LAST = 64
COMPARING = "Comparing with PyTorch"
_PART = 1 << 21  # numbers that are compared together


@dataclass(frozen=True)
class Text:
    """What is run: ``rows`` of token ids as one ragged batch, then each row of ``alone`` by itself.

    The last ``steps`` tokens of each row are decoded, the others prefilled. What is not ``cached`` has no KV cache, and
    computes all tokens again in each step.
    """

    rows: Rows
    steps: int
    alone: Rows = ()
    cached: bool = True

    @property
    def batches(self) -> list[Rows]:
        return [self.rows, *([row] for row in self.alone)]

    def passes(self, batch: Rows) -> Iterator[tuple[I64, I64, I64]]:
        """Ids, mask and positions of the prefill and of each step, padded on the left."""
        ids, mask, positions = left_padded([row[: len(row) - self.steps] for row in batch])
        yield ids, mask, positions
        for left in range(self.steps, 0, -1):
            if self.cached:
                ids, mask, positions = one_more([int(row[-left]) for row in batch], mask, positions)
                yield ids, mask, positions
            else:
                yield left_padded([row[: len(row) - left + 1] for row in batch])

    def real(self, left: bool = True) -> list[BOOL]:
        """Which positions [batch, sequence] of each pass are no padding, which is on the ``left`` or on the right."""
        every = (one for batch in self.batches for one in self.passes(batch))
        masks = [mask[:, -ids.shape[1] :].astype(bool) for ids, mask, _ in every]
        return masks if left else [mask[:, ::-1] for mask in masks]


@dataclass(frozen=True)
class Step:
    """What one pass gave: ``logits`` [vectors, vocab] and, where it is ``kept``, the cache after it."""

    logits: F32
    kept: Kept | None


@dataclass(frozen=True)
class Recorded:
    """What was given for a text, so that the next one is run when it is gone: the steps of each batch.

    ``lengths`` are those of the ragged prompts; ``kv_layers`` are the layers of the caches, None without one;
    ``choices`` are those of a graph's experts, if it has any that were watched.
    """

    kv_layers: tuple[int, ...] | None
    lengths: tuple[int, ...]
    batches: tuple[tuple[Step, ...], ...]
    choices: Choices | None = None


def stepped(stream: Stream, text: Text) -> Iterator[Pass]:
    """Run ``stream`` over all batches of ``text``: one prefill each, then teacher-forced decode steps."""
    for batch in text.batches:
        if text.alone:
            stream.reserve(max(map(len, batch)))
        yield stream.prefill([row[: len(row) - text.steps] for row in batch]), stream.cache
        for step in range(-text.steps, 0):
            yield stream.decode([int(row[step]) for row in batch]), stream.cache


def record(
    passes: Iterable[Pass],
    kv_layers: tuple[int, ...] | None,
    text: Text,
    listener: Listener | None = None,
    title: str = COMPARING,
) -> Recorded:
    """Keep what the ``passes`` over ``text`` give, batch after batch; the ``listener`` is told of each."""
    batches: list[list[Step]] = []
    each = text.steps + 1
    with (listener or Silent()).task(title, len(text.batches) * each, "steps") as task:
        for number, (logits, cache) in enumerate(passes):
            if number % each == 0:
                batches.append([])
            ragged, last = len(batches) == 1, number % each == text.steps
            logits = logits if ragged else logits[-LAST:].copy()
            batches[-1].append(Step(logits, cache() if ragged or last else None))
            task.advance(1)
    return Recorded(kv_layers, tuple(len(row) - text.steps for row in text.rows), tuple(map(tuple, batches)))


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
    found: dict[str, Any] = {"kv_max_abs": 0.0, "kv_max_rel": 0.0, "kv_mean_rel": 0.0, "kv_worst_layer": None}
    without_bound = dict.fromkeys(list(found)[:3], np.inf)
    means: list[float] = []
    for a, b in pairs:
        if a.kept is None or b.kept is None or not b.kept[0]:  # a candidate without a cache
            continue
        (cache, real), (other, other_real) = a.kept, b.kept
        if len(cache) != len(other):
            return found | without_bound | {"kv_worst_layer": None}
        # After keys and values each state by itself.
        places = [*layers, *[None] * (len(cache) - len(layers))]
        for layer, sides_a, sides_b in zip(places, cache, other, strict=True):
            for x, y in zip(sides_a, sides_b, strict=True):
                u, v = _states(x, y) if layer is None else (_tokens(x, real), _tokens(y, other_real))
                if u is None or v is None or u.shape != v.shape:
                    return found | without_bound | {"kv_worst_layer": layer}
                difference = np.abs(u - v)
                relative = difference / np.maximum(np.maximum(np.abs(u), rms(u)), 1e-12)
                # NaN compares with nothing; as infinity it is the worst there is.
                most, most_rel = (float(np.nan_to_num(d.max(), nan=np.inf)) for d in (difference, relative))
                means.append(float(relative.mean()))
                found["kv_max_abs"] = max(found["kv_max_abs"], most)
                if most_rel > found["kv_max_rel"]:
                    found |= {"kv_max_rel": most_rel, "kv_worst_layer": layer}
    return found | {"kv_mean_rel": float(np.mean(means)) if means else 0.0}


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
