"""Losses of sets of layers, and what is known of one: ratios and their errors by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nbl_export.linearize.selection import Candidate, Loss, exp
from nbl_export.records import from_json, to_json


def test_a_perplexity_ratio_by_hand() -> None:
    """An excess of ln 1.25 nats a token is a quarter more perplexity."""
    loss = Loss(kl=0.5, kl_se=0.1, excess=math.log(1.25), excess_se=0.02)
    assert loss.perplexity_ratio == pytest.approx(1.25)
    assert loss.perplexity_ratio_se == pytest.approx(0.025)
    # The likelihood may also rise; KL says nothing of that.
    assert Loss(9.0, 0.0, -math.log(2), 0.0).perplexity_ratio == pytest.approx(0.5)
    assert (Loss(0.0, 0.0, 0.0, 0.0).perplexity_ratio, Loss(0.0, 0.0, 0.0, 0.0).perplexity_ratio_se) == (1, 0)


@pytest.mark.parametrize("excess", [-0.3, 0.0, 0.7])
def test_the_error_of_a_ratio_is_the_spread_of_ratios(excess: float) -> None:
    """Against draws: of a small error the exponential is straight."""
    draws = np.exp(np.random.default_rng(0).normal(excess, 0.01, 200_000))
    loss = Loss(0.0, 0.0, excess, 0.01)
    assert loss.perplexity_ratio == pytest.approx(np.median(draws), rel=1e-3)
    assert loss.perplexity_ratio_se == pytest.approx(draws.std(), rel=0.01)


def test_a_loss_that_is_no_number_stays_none() -> None:
    loss = Loss(math.nan, 0.0, math.nan, 0.0)
    assert math.isnan(loss.perplexity_ratio) and math.isnan(loss.perplexity_ratio_se)
    assert Loss(math.inf, 0.0, math.inf, 0.0).perplexity_ratio == math.inf


def test_a_loss_as_json_is_what_was_measured_and_not_what_follows() -> None:
    loss = Loss(0.5, 0.1, 0.2, 0.02)
    assert loss.as_json() == {"kl": 0.5, "kl_se": 0.1, "excess": 0.2, "excess_se": 0.02}
    assert Loss(**loss.as_json()) == loss


def test_a_candidate_is_kept_with_what_was_not_measured() -> None:
    """Not measured is not nought, nor is a KL without bound."""
    candidate = Candidate(3, 0.25, 4.5, 1e-6, 1e-5, kl=math.inf, kl_se=0.0, predicted=0.125)
    raw = json.loads(json.dumps(to_json(candidate), allow_nan=False))
    assert (raw["layer"], raw["kl"], raw["kl_se"], raw["drop"], raw["sensitivity"]) == (
        3,
        "inf",
        0.0,
        None,
        None,
    )
    assert from_json(Candidate, raw, "it", "do it again") == candidate


def test_a_perplexity_beyond_the_largest_number_is_infinite() -> None:
    loss = Loss(1.0, 0.0, 800.0, 0.0)
    assert loss.perplexity_ratio == math.inf and loss.finite
    assert not Loss(math.nan, 0.0, 0.0, 0.0).finite and not Loss(0.0, 0.0, math.inf, 0.0).finite
    assert exp(1.0) == math.e and math.isnan(exp(math.nan))
