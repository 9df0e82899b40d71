"""What is known of layers and of sets of layers before some are chosen: values alone, which import nothing heavy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nbl_export.blocks import Block


def exp(nats: float) -> float:
    """e to the ``nats``; infinity where that is beyond the largest number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def per_saving(loss: float, saved: float) -> float:
    """The ``loss`` for each unit that is ``saved``, by which blocks are ranked: infinite where nothing is saved.

    What gains instead of losing is better the more it saves.
    """
    if saved <= 0:
        return math.inf
    return loss / saved if loss > 0 else loss * saved


@dataclass(frozen=True)
class Candidate:
    """What is known of one layer before choosing. All scores: lower is better to replace.

    ``nmse`` in [0, 1] is of the fit itself; ``cca`` in [0, d] is the paper's bound. ``ridge`` and
    ``cca_ridge`` are the λ that the two Cholesky factorizations needed. What was measured with the layer alone
    changed, in nats, is None where the criterion does not ask for it: ``kl`` of its replacement, ``drop`` of leaving
    it out, ``sensitivity``: the KL by noise, per share of the output, and ``predicted`` = nmse × sensitivity.
    ``saved_ms`` are the milliseconds of the workload that it saves, None without a workload.
    """

    layer: Block
    nmse: float
    cca: float
    ridge: float
    cca_ridge: float
    kl: float | None = None
    kl_se: float | None = None
    drop: float | None = None
    drop_se: float | None = None
    sensitivity: float | None = None
    sensitivity_se: float | None = None
    predicted: float | None = None
    saved_ms: float | None = None


@dataclass(frozen=True)
class Loss:
    """Mean KL in nats and excess (of the log-likelihood) in nats per token, with standard errors over documents."""

    kl: float
    kl_se: float
    excess: float
    excess_se: float

    @property
    def finite(self) -> bool:
        """Whether the losses themselves are numbers; a standard error may be none."""
        return math.isfinite(self.kl) and math.isfinite(self.excess)

    @property
    def perplexity_ratio(self) -> float:
        return exp(self.excess)

    @property
    def perplexity_ratio_se(self) -> float:
        return exp(self.excess) * self.excess_se

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
