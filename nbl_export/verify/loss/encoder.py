"""Method loss of an encoder: original against linearized model on held-out documents or images.

For states, pooled vectors and sentence embeddings the mean cosine of the two models' vectors; for the logits
of a head the share of equal top classes and KL(original ‖ linearized). The standard error is over documents
(or images), the sampling unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nbl_export.batch.arrays import F64
from nbl_export.batch.rows import Inputs, batch_of_rows
from nbl_export.linearize.loss import mean_over_documents
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.verify.loss.figures import Likeness, Measure
from nbl_export.verify.parity.encoder import vectors
from nbl_export.verify.parity.figures import LOGITS
from nbl_export.verify.parity.vectors import log_softmax


def measure_likeness(
    encoder: TorchEncoder, plan: Plan, rows: Sequence[Inputs], unit: str, listener: Listener | None = None
) -> Likeness:
    """How much the outputs of ``encoder`` change by ``plan``, on ``rows``, each a batch of one."""
    found: dict[str, list[F64]] = {}
    with (listener or Silent()).task("Measuring method loss", len(rows), unit) as task:
        for alone in rows:
            row = batch_of_rows([alone])
            original = encoder(row)
            with linearized(encoder.encoder.model, plan):
                changed = encoder(row)
            for name, before in original.items():
                a, b = (vectors(v, row).astype(np.float64) for v in (before, changed[name]))
                for what, values in _compared(name, a, b).items():
                    found.setdefault(what, []).append(values)
            task.advance(1)
    measures = []
    for what, by_row in found.items():
        owner = np.repeat(np.arange(len(by_row), dtype=np.int32), [len(v) for v in by_row])
        values = np.concatenate(by_row)
        measures.append(Measure(what, *mean_over_documents(values, owner), len(values)))
    return Likeness(len(rows), unit, tuple(measures))


def _compared(name: str, a: F64, b: F64) -> dict[str, F64]:
    if name != LOGITS:
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return {f"cosine of {name}": (a * b).sum(axis=1) / np.maximum(norms, 1e-300)}
    if a.shape[1] == 1:  # a score, as of a reward model
        return {"change of the score": np.abs(a - b)[:, 0]}
    log_p, log_q = log_softmax(a), log_softmax(b)
    return {
        "top-1 agreement": (a.argmax(axis=1) == b.argmax(axis=1)).astype(np.float64),
        "KL to the original, nats": (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
    }
