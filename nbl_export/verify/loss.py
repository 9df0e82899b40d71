"""Measure what linearizing costs, original against linearized model, on held-out text or images.

Apart from parity, and never mixed with it. Of a decoder, KL and perplexity: :mod:`nbl_export.linearize.loss`. Of an
encoder, for states, pooled vectors and sentence embeddings the mean cosine of the two models' vectors; for the logits
of a head the share of equal top classes and KL(original ‖ linearized). Standard errors are over documents (or images),
the sampling unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import F64, Inputs, batch_of_rows
from nbl_export.linearize.loss import compare, mean_over_documents, reference, sums_of
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.selection import exp
from nbl_export.linearize.swap import ORIGINAL, linearized, sweep, version_of
from nbl_export.models.media_tokens import written
from nbl_export.models.weights import device_of, streams
from nbl_export.progress import Listener, Silent
from nbl_export.records import Check
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.settings import LossBound
from nbl_export.verify.parity.compare import log_softmax, vectors
from nbl_export.verify.parity.figures import LOGITS, Likeness, Measure, MethodLoss


def measure_method_loss(
    model: torch.nn.Module,
    plan: Plan,
    heldout: NDArray[np.int32],
    document: NDArray[np.int32],
    listener: Listener | None = None,
) -> MethodLoss:
    """The method loss of ``plan`` on ``heldout`` [rows, seq_len], whose tokens belong to ``document``."""
    rows = [torch.from_numpy(row.astype(np.int64)).to(device_of(model)) for row in heldout]
    found: list[tuple[F64, F64, F64]] = []
    with (
        (listener or Silent()).task("Measuring method loss", heldout.size, "tokens") as task,
        torch.inference_mode(),
    ):
        for ids, (logits, changed) in zip(rows, _both(model, plan, rows, listener), strict=True):
            targets = written(ids)[1:]
            original = reference(logits[:-1], targets)
            own = original.nll.double().cpu().numpy()
            found.append((own, *compare(original, changed[:-1], targets)))
            task.advance(len(ids))
    # Nobody predicts the embeddings of images, whose tokens are of no document.
    owner = document[:, 1:].reshape(-1)
    before, kl, excess = (np.concatenate(figure)[owner >= 0] for figure in zip(*found, strict=True))
    owner = owner[owner >= 0]
    loss, nll = sums_of(kl, excess, owner).loss, float(before.mean())
    return MethodLoss(
        documents=len(np.unique(owner)),
        tokens=len(owner),
        perplexity_original=exp(nll),
        perplexity_linearized=exp(nll + loss.excess),
        perplexity_ratio=loss.perplexity_ratio,
        perplexity_ratio_se=loss.perplexity_ratio_se,
        kl=loss.kl,
        kl_se=loss.kl_se,
    )


def _both(
    model: torch.nn.Module, plan: Plan, rows: Sequence[torch.Tensor], listener: Listener | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [seq, vocab] of each row by ``model``, and by ``plan``."""
    both = [ORIGINAL, version_of(model, plan)]
    # Weights that are read are read once for all rows; where they stay, the states of one row are enough.
    at_once, told = (len(rows), listener) if streams(model) else (1, None)
    for at in range(0, len(rows), at_once):
        found = sweep(model, rows[at : at + at_once], both, plan.fit_input, listener=told)
        for (_, _, logits), (_, _, changed) in zip(found, found, strict=True):
            yield logits, changed


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


def loss_checks(loss: MethodLoss | Likeness, bound: LossBound) -> list[Check]:
    """A verdict that failed where the loss is no number, and one for each bound of a decoder that there is.

    What is no number is within no bound.
    """
    if isinstance(loss, Likeness):
        figures, bounds = {m.what: m.value for m in loss.measures}, []
    else:
        ratio, ratio_se, kl, kl_se = loss.perplexity_ratio, loss.perplexity_ratio_se, loss.kl, loss.kl_se
        figures = {"perplexity ratio": ratio, "KL": kl}
        bounds = [
            ("perplexity bound", "perplexity × ", ratio, ratio_se, bound.max_perplexity_ratio),
            ("KL bound", "KL ", kl, kl_se, bound.max_kl),
        ]
    wrong = [f"{what} is {value:g}" for what, value in figures.items() if not math.isfinite(value)]
    found = [Check("method loss", "failed", f"{'; '.join(wrong)} on held-out data")] if wrong else []
    for name, what, value, error, most in bounds:
        if most is not None:
            within = value <= most
            # Of one document no error is known; 0 would look certain.
            known = f" ± {error:.4f}" if loss.documents > 1 else ""
            side = "within" if within else "above"
            said = f"{what}{value:.4f}{known} on held-out text, {side} the {most:g} asked for"
            found.append(Check(name, "passed" if within else "failed", said))
    return found
