"""Parity: does the graph compute what PyTorch computes with the same plan?

Both run the same ragged batch: one prefill, then teacher-forced decode steps, each with
its own real cache. Only real tokens are compared, never padding. For logits a (reference) and b:

abs   |a - b|                          rel   |a - b| / max(|a|, rms of the token's a)
cosine of the vectors a and b          KL    KL(softmax a ‖ softmax b) in nats
top-1 the same most likely token; where they differ although the reference's best two lie closer
      than the gate's ``near_tie``, the token is a near-tie and is not counted against the graph

Keys and values are compared by |a - b| / max(|a|, rms of the head's vector), over the whole cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.datafile import read_table
from nbl_export.errors import InputError
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.decoder import KV
from nbl_export.runtime.stream import Stream


@dataclass(frozen=True)
class Gates:
    """The limits of one dtype, from ``gates.toml``; what is not there does not limit."""

    max_abs_logit: float = float("inf")
    min_cosine: float = -1.0
    max_kl: float = float("inf")
    top1: float = 0.0
    near_tie: float = 0.0
    max_rel_kv: float = float("inf")
    max_rel_state: float = float("inf")
    max_vs_own: float = float("inf")


def gates_for(dtype: str) -> Gates:
    """The gates of a dtype such as ``float32``."""
    return Gates(**read_table(Path(__file__).parent / "gates.toml")[dtype])


@dataclass(frozen=True)
class StepParity:
    """One forward pass compared: step 0 is the prefill, the others decode one token each."""

    step: int
    tokens: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    p99_rel: float
    min_cosine: float
    max_kl: float
    top1: float
    near_ties: int
    kv_max_abs: float
    kv_max_rel: float
    kv_mean_rel: float
    kv_worst_layer: int | None


@dataclass(frozen=True)
class Parity:
    """The comparison of a whole run: prompt lengths, every step, and the gates they are held to."""

    prompt_lengths: tuple[int, ...]
    steps: tuple[StepParity, ...]
    gates: Gates

    def failures(self) -> list[str]:
        """One sentence for each gate that fails, with the worst value and its step; empty is a pass."""
        g, worst = self.gates, []
        for what, values, limit, low in (
            ("max |Δlogit|", [s.max_abs for s in self.steps], g.max_abs_logit, False),
            ("cosine", [s.min_cosine for s in self.steps], g.min_cosine, True),
            ("KL", [s.max_kl for s in self.steps], g.max_kl, False),
            ("top-1 agreement", [s.top1 for s in self.steps], g.top1, True),
            ("KV relative error", [s.kv_max_rel for s in self.steps], g.max_rel_kv, False),
        ):
            step = int(np.argmin(values) if low else np.argmax(np.nan_to_num(values, nan=np.inf)))
            value = values[step]
            # Written so that NaN fails.
            if not (value >= limit if low else value <= limit):
                worst.append(f"{what} is {value:.3g} at step {step}; the gate is {limit:g}")
        return worst

    def failures_against(self, own: Parity, whose: str) -> list[str]:
        """Like :meth:`failures`, against what is lost in this precision anyway: ``own``, and ``whose`` that is."""
        found, allowed = (float(np.mean([s.mean_abs for s in p.steps])) for p in (self, own))
        limit = self.gates.max_vs_own
        if found <= limit * allowed:
            return []
        return [f"mean |Δlogit| is {found:.3g}, {whose} {allowed:.3g}; the gate is {limit:g} times that"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_streams(
    reference: Stream,
    candidate: Stream,
    rows: Sequence[NDArray[np.int32]],
    decode_steps: int,
    gates: Gates,
    listener: Listener | None = None,
) -> Parity:
    """Run both over ``rows``: all but the last ``decode_steps`` tokens prefilled, the rest decoded.

    ``rows`` are token ids of different lengths, each longer than ``decode_steps``. Raises
    :class:`InputError` if the two do not cache the same layers. Of a candidate that keeps no cache only
    the logits are compared.
    """
    layers = reference.kv_layers if candidate.kv_layers is not None else ()
    if layers != (candidate.kv_layers or ()):
        raise InputError(
            f"The graph caches layers {candidate.kv_layers}, the plan leaves {reference.kv_layers}: "
            "it was rewritten by another plan."
        )
    prompts = [row[: len(row) - decode_steps] for row in rows]
    steps = []
    with (listener or Silent()).task("Comparing with PyTorch", decode_steps + 1, "steps") as task:
        for step in range(decode_steps + 1):
            if step:
                taught = [int(row[len(row) - decode_steps + step - 1]) for row in rows]
                a, b = reference.decode(taught), candidate.decode(taught)
            else:
                a, b = reference.prefill(prompts), candidate.prefill(prompts)
            kv = _compare_kv(reference.cache(), candidate.cache(), layers or ())
            steps.append(compare_vectors(step, a, b, gates.near_tie, kv))
            task.advance(1)
    return Parity(tuple(len(p) for p in prompts), tuple(steps), gates)


_NO_CACHE = (0.0, 0.0, 0.0, None)


def compare_vectors(
    step: int,
    a: F32,
    b: F32,
    near_tie: float,
    kv: tuple[float, float, float, int | None] = _NO_CACHE,
) -> StepParity:
    """The figures of logits (or other vectors) ``b`` against the reference ``a``, each [vectors, d]."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    difference = np.abs(x - y)
    relative = difference / np.maximum(np.abs(x), _rms(x))
    log_p, log_q = log_softmax(x), log_softmax(y)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    cosine = np.sum(x * y, axis=-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    best_two = np.partition(x, -2, axis=-1)[:, -2:]
    same = x.argmax(axis=-1) == y.argmax(axis=-1)
    tie = ~same & (best_two[:, 1] - best_two[:, 0] < near_tie)
    return StepParity(
        step=step,
        tokens=len(x),
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
        kv_max_abs=kv[0],
        kv_max_rel=kv[1],
        kv_mean_rel=kv[2],
        kv_worst_layer=kv[3],
    )


def _compare_kv(
    reference: tuple[Sequence[KV], BOOL], candidate: tuple[Sequence[KV], BOOL], layers: Sequence[int]
) -> tuple[float, float, float, int | None]:
    worst_abs, worst_rel, worst_layer = 0.0, 0.0, None
    means = []
    (a, real_a), (b, real_b) = reference, candidate
    for layer, pair_a, pair_b in zip(layers, a, b, strict=bool(layers)):
        for x, y in zip(pair_a, pair_b, strict=True):
            u, v = _real(x, real_a), _real(y, real_b)
            if u is None or v is None or u.shape != v.shape:
                return float("inf"), float("inf"), float("inf"), layer
            difference = np.abs(u - v)
            relative = difference / np.maximum(np.maximum(np.abs(u), _rms(u)), 1e-12)
            # NaN compares with nothing; as infinity it is the worst there is.
            largest, largest_rel = (
                float(np.nan_to_num(np.max(d), nan=np.inf)) for d in (difference, relative)
            )
            means.append(float(relative.mean()))
            worst_abs = max(worst_abs, largest)
            if largest_rel > worst_rel:
                worst_rel, worst_layer = largest_rel, layer
    return worst_abs, worst_rel, float(np.mean(means)) if means else 0.0, worst_layer


def _real(cache: NDArray[Any], real: BOOL) -> NDArray[np.float64] | None:
    """The [tokens, heads, head_dim] that are no padding, or None if the cache is not of that size."""
    if (cache.shape[0], cache.shape[2]) != real.shape:
        return None
    return np.moveaxis(cache, 1, 2)[real].astype(np.float64)


def _rms(x: NDArray[np.float64]) -> NDArray[np.float64]:
    rms: NDArray[np.float64] = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    return rms


def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
