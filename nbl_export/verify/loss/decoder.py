"""Method loss: what linearizing costs, original against linearized model, on held-out text.

Apart from parity, and never mixed with it. What is measured, and its standard error: :mod:`nbl_export.linearize.loss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbl_export.blocks import layer_of
from nbl_export.linearize.loss import compare, loss_over_documents, reference, row_logits
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.selection import exp
from nbl_export.linearize.swap import linearized
from nbl_export.linearize.sweep import ORIGINAL, sweep, version_of
from nbl_export.models.media_tokens import written
from nbl_export.models.walk import first_needed, recording_inputs, starting_at
from nbl_export.models.weights import device_of, streams
from nbl_export.progress import Listener, Silent
from nbl_export.verify.loss.figures import MethodLoss

if TYPE_CHECKING:
    import torch


def measure_method_loss(
    model: torch.nn.Module,
    plan: Plan,
    heldout: NDArray[np.int32],
    document: NDArray[np.int32],
    listener: Listener | None = None,
) -> MethodLoss:
    """The method loss of ``plan`` on ``heldout`` [rows, seq_len], whose tokens belong to ``document``."""
    import torch

    before, kl, excess = [], [], []
    rows = [torch.from_numpy(row.astype(np.int64)).to(device_of(model)) for row in heldout]
    with (
        (listener or Silent()).task("Measuring method loss", heldout.size, "tokens") as task,
        torch.inference_mode(),
    ):
        for ids, (logits, changed) in zip(rows, _both(model, plan, rows, listener), strict=True):
            original = reference(logits, written(ids))
            row_kl, row_excess = compare(original, changed, written(ids))
            before.append(original.nll.double().cpu().numpy())
            kl.append(row_kl)
            excess.append(row_excess)
            task.advance(len(ids))
    # Nobody predicts the embeddings of images, whose tokens are of no document.
    counted = document[:, 1:].reshape(-1) >= 0
    owner = document[:, 1:].reshape(-1)[counted]
    loss = loss_over_documents(np.concatenate(kl)[counted], np.concatenate(excess)[counted], owner)
    nll = float(np.concatenate(before)[counted].mean())
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
    if streams(model):
        both = [ORIGINAL, version_of(model, plan)]
        found = sweep(model, rows, both, plan.fit_input, listener=listener)
        for (_, _, logits), (_, _, changed) in zip(found, found, strict=True):
            yield logits, changed
        return
    # Nothing is changed before the first of the plan's layers: the second run begins there.
    first = first_needed(model, layer_of(min(plan.chosen))) if plan.chosen else 0
    for row in rows:
        with recording_inputs(model, [first]) as states:
            logits = row_logits(model, row)
        with linearized(model, plan), starting_at(model, first, states[first]):
            yield logits, row_logits(model, row)
