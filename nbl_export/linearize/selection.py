"""Values of choosing layers: scores, losses, the K curve. ``nbl/candidates.json`` and reports keep them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from nbl_export.batch import F64
from nbl_export.blocks import Block, all_parts
from nbl_export.settings import Budget
from nbl_export.settings.choices import FAR_LOOK_UP
from nbl_export.settings.making import NO_BUDGET

# What a nat of synthetic rows counts beside one of the text (docs/selection.md has what was measured).
SYNTHETIC = 0.3


def exp(nats: float) -> float:
    """e to the ``nats``; infinity where that is beyond the largest number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


Nats = TypeVar("Nats", float, F64)


def cost_of(kl: Nats, synthetic: Mapping[str, float]) -> Nats:
    """The ``kl`` of the text, and :data:`SYNTHETIC` times that of rows that look far back and the mean of the other
    kinds of ``synthetic`` rows.
    """
    near = [value for kind, value in synthetic.items() if kind != FAR_LOOK_UP]
    return kl + SYNTHETIC * (sum(near) / max(len(near), 1) + synthetic.get(FAR_LOOK_UP, 0.0))


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
    ``saved_ms`` are the milliseconds of the workload that it saves, None without a workload. ``synthetic`` is the KL of
    its replacement on synthetic rows, by their kind. ``stable`` is the share of resampled documents by which it would
    be chosen, None where that is not known.
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
    synthetic: Mapping[str, float] | None = None
    stable: float | None = None


@dataclass(frozen=True)
class ScoredLayer(Candidate):
    """A candidate, and what its attention sees: ``"full"``, ``"sliding window"`` …"""

    kind: str = "full"


@dataclass(frozen=True)
class Loss:
    """Mean KL in nats and excess (of the log-likelihood) in nats per token, with standard errors over documents.

    ``synthetic`` is the KL of synthetic rows by their kind, empty where there are none.
    """

    kl: float
    kl_se: float
    excess: float
    excess_se: float
    synthetic: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the losses themselves are numbers; a standard error may be none."""
        return all(map(math.isfinite, (self.kl, self.excess, *self.synthetic.values())))

    @property
    def cost(self) -> float:
        """What sets are compared by."""
        return cost_of(self.kl, self.synthetic)

    @property
    def perplexity_ratio(self) -> float:
        return exp(self.excess)

    @property
    def perplexity_ratio_se(self) -> float:
        return exp(self.excess) * self.excess_se

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sums:
    """What was measured of a set: tokens, Σ KL and Σ excess of each document of the ``text``, by its number, and of
    each kind of ``synthetic`` rows.
    """

    text: Mapping[str, Sequence[float]] = field(default_factory=dict)
    synthetic: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __add__(self, other: Sums) -> Sums:
        return Sums(_added(self.text, other.text), _added(self.synthetic, other.synthetic))

    def divided(self, by: float) -> Sums:
        """The same per token, ``by`` times smaller."""
        text, synthetic = (
            {name: (tokens, kl / by, excess / by) for name, (tokens, kl, excess) in sums.items()}
            for sums in (self.text, self.synthetic)
        )
        return Sums(text, synthetic)

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return all(map(math.isfinite, itertools.chain(*self.text.values(), *self.synthetic.values())))

    @property
    def kl(self) -> float:
        """Σ KL of all that was measured."""
        return sum(kl for _, kl, _ in (*self.text.values(), *self.synthetic.values()))

    @property
    def loss(self) -> Loss:
        tokens, kl, excess = np.array(list(self.text.values()), dtype=np.float64).T
        synthetic = {kind: kl / tokens for kind, (tokens, kl, _) in self.synthetic.items()}
        return Loss(*mean_of_documents(kl, tokens), *mean_of_documents(excess, tokens), synthetic)


def _added(
    one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> dict[str, Sequence[float]]:
    zero = (0.0, 0.0, 0.0)
    return {
        name: tuple(a + b for a, b in zip(one.get(name, zero), other.get(name, zero), strict=True))
        for name in {**one, **other}
    }


def mean_of_documents(sums: F64, tokens: F64) -> tuple[float, float]:
    """Mean of per-token values, whose ``sums`` over documents of so many ``tokens`` are given, and its standard error.

    Documents are the sampling unit: se² = D/(D-1) Σ_i (s_i - n_i · mean)² / n² for D documents and n tokens; 0 for one
    document, from which it cannot be estimated.
    """
    count, total = len(sums), float(tokens.sum())
    mean = float(sums.sum()) / total
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(count / (count - 1) * float(np.sum((sums - mean * tokens) ** 2))) / total


@dataclass(frozen=True)
class CurvePoint:
    """What K ``layers`` (ascending) cost, and what they gain where it was measured: speedups over the unmodified graph.

    K counts attentions and MLPs, of which a span has two for each of its layers.

    ``kl`` in nats per token; standard errors over documents. ``workload_speedup`` is what the workload gains by what
    each block saves of it; ``timed_speedup`` is that of the graph with these layers, measured.
    """

    k: int
    layers: tuple[Block, ...]
    kl: float
    kl_se: float | None
    perplexity_ratio: float
    perplexity_ratio_se: float | None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    workload_speedup: float | None = None
    timed_speedup: float | None = None

    @classmethod
    def of(cls, layers: Sequence[Block], loss: Loss) -> CurvePoint:
        """The point of the ``layers``, which were measured to cost ``loss``."""
        ratio, ratio_se = loss.perplexity_ratio, loss.perplexity_ratio_se
        return cls(len(all_parts(layers)), tuple(sorted(layers)), loss.kl, loss.kl_se, ratio, ratio_se)


class Cost(Protocol):
    """A loss as a budget bounds it."""

    @property
    def kl(self) -> float: ...

    @property
    def perplexity_ratio(self) -> float: ...


def keeps(budget: Budget, loss: Cost) -> bool:
    """Whether ``loss`` is within the bounds of loss."""
    within_kl = budget.max_kl is None or loss.kl <= budget.max_kl
    ratio = budget.max_perplexity_ratio
    return within_kl and (ratio is None or loss.perplexity_ratio <= ratio)


@dataclass(frozen=True)
class Curve:
    """What each K costs; ``chosen`` is the K that was taken, ``context`` the tokens that speeds were measured at.

    Losses are means over ``tokens`` predictions of ``documents`` documents of the selection text.
    """

    points: tuple[CurvePoint, ...]
    chosen: int | None = None
    budget: Budget = NO_BUDGET
    context: int | None = None
    tokens: int | None = None
    documents: int | None = None

    @property
    def by_k(self) -> list[CurvePoint]:
        """The points, smallest K first."""
        return sorted(self.points, key=lambda p: p.k)


@dataclass(frozen=True)
class PlanLoss:
    """What the maps that were kept cost together on the selection text, each None where it was not measured.

    ``predicted_excess`` in nats per token, by the linearity theorem; ``rank_lost`` by layer: the share of the
    output's variance that a map of low rank leaves out; ``ranks`` where they were chosen, of the maps that have one.
    ``loss`` is of the maps as they are in the plan.
    """

    predicted_excess: float | None = None
    before_repair: Loss | None = None
    before_rank: Loss | None = None
    rank_lost: Mapping[str, float] | None = None
    loss: Loss | None = None
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Scores:
    """Every layer's scores, the layers that are no candidates (``others``: what they are), the K curve, the result.

    ``calibration_dtype`` is that in which the model read the calibration text. ``workload`` is what the model is used
    for, of which the unmodified graph takes ``workload_ms``: the least, as counted; empty where layers are chosen by
    loss alone. ``kl_tokens`` are the predictions that a single layer's KL is a mean of: a search looks at fewer for it
    than for sets.
    """

    candidates: tuple[ScoredLayer, ...]
    others: Mapping[str, str] = field(default_factory=dict)
    curve: Curve | None = None
    result: PlanLoss | None = None
    calibration_dtype: str | None = None
    workload: tuple[str, ...] = ()
    workload_ms: float | None = None
    kl_tokens: int | None = None
