"""What choosing layers found: ratios and their errors, bounds of loss, and how it is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nbl_export.linearize.selection import (
    Curve,
    CurvePoint,
    Loss,
    PlanLoss,
    ScoredLayer,
    Scores,
    exp,
    keeps,
    per_saving,
)
from nbl_export.records import from_json, to_json
from nbl_export.settings import Budget

LOSS = Loss(0.5, 0.1, 0.2, 0.02)
POINTS = tuple(CurvePoint.of(range(k), replace(LOSS, kl=0.1 * (9 - k))) for k in (3, 1, 4, 2))
SCORES = Scores(
    (
        ScoredLayer(0, 0.5, 2.0, 1e-6, 1e-6),
        ScoredLayer(2, 0.25, 1.0, 1e-6, 1e-6, kl=math.inf, kind="sliding window"),
    ),
    {"1": "state space"},
    Curve(POINTS, 0, Budget(max_kl=0.0), 512, 4096, 12),
    PlanLoss(0.1, LOSS, None, {"2": 0.01}, LOSS),
    "bfloat16",
)


def test_a_perplexity_ratio_by_hand() -> None:
    """An excess of ln 1.25 nats a token is a quarter more perplexity."""
    loss = Loss(kl=0.5, kl_se=0.1, excess=math.log(1.25), excess_se=0.02)
    assert loss.perplexity_ratio == pytest.approx(1.25)
    assert loss.perplexity_ratio_se == pytest.approx(0.025)
    point = CurvePoint.of((7, 3), loss)
    assert (point.k, point.layers, point.perplexity_ratio_se) == (2, (3, 7), pytest.approx(0.025))
    beyond = Loss(1.0, 0.0, 800.0, 0.0)
    assert beyond.perplexity_ratio == math.inf and beyond.finite and math.isnan(exp(math.nan))
    assert not Loss(math.nan, 0.0, 0.0, 0.0).finite and not Loss(0.0, 0.0, math.inf, 0.0).finite
    assert Loss(0.1, math.nan, 0.1, math.nan).finite


def test_losses_for_what_is_saved() -> None:
    assert [per_saving(3.0, 2.0), per_saving(-3.0, 2.0), per_saving(0.0, 2.0)] == [1.5, -6.0, 0.0]
    assert per_saving(1.0, 0.0) == per_saving(-1.0, -1.0) == math.inf


@pytest.mark.parametrize(
    ("budget", "kl", "ratio", "kept"),
    [
        (Budget(max_kl=0.2), 0.2, 1.0, True),
        (Budget(max_kl=0.2), 0.2001, 1.0, False),
        (Budget(max_kl=0.2), math.nan, 1.0, False),
        (Budget(max_perplexity_ratio=1.1), 9.0, 1.0999, True),
        (Budget(max_perplexity_ratio=1.1), 0.0, 1.1001, False),
        (Budget(0.2, 1.1), 0.1, 1.2, False),
        (Budget(0.2, 1.1), 0.3, 1.0, False),
        (Budget(min_speedup=9.0), 99.0, 99.0, True),
    ],
)
def test_a_loss_is_kept_or_not(budget: Budget, kl: float, ratio: float, kept: bool) -> None:
    assert keeps(budget, Loss(kl, 0.0, math.log(ratio), 0.0)) is kept


def test_scores_come_back_from_json() -> None:
    """Not measured is not nought, nor is a KL without bound."""
    raw = json.loads(json.dumps(to_json(SCORES), allow_nan=False))
    assert from_json(Scores, raw, "it", "do it again") == SCORES
    assert [p.k for p in SCORES.curve.by_k] == [1, 2, 3, 4]  # type: ignore[union-attr]
