"""Compare vectors with the reference's: the figures of decoders and encoders, and the parity of an encoder.

For logits (or other vectors) a (reference) and b:

abs   |a - b|                          rel   |a - b| / max(|a|, rms of the token's a)
cosine of the vectors a and b          KL    KL(softmax a ‖ softmax b) in nats
top-1 the same most likely token; where they differ although the reference's best two lie closer
      than the gate's ``near_tie``, the token is a near-tie and is not counted against the graph

Of an encoder, PyTorch and the graph run one ragged batch, padded as the tokenizer does it, and one for each row that
crosses a length of the model, or one batch of images. Only real tokens are compared, each output by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nbl_export.batch.arrays import F32, F64
from nbl_export.batch.rows import Inputs, Outputs, real_positions
from nbl_export.verify.parity.figures import Figures, Gates, OutputParity, OutputsParity

_PART = 1 << 21  # numbers that are compared together


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
