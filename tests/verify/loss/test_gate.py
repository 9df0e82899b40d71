"""The gates on what linearizing costs: a bound is met or it is not, and what is no number meets none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nbl_export.settings import NO_BOUND, LossBound
from nbl_export.verify.loss.figures import Likeness, Measure, MethodLoss
from nbl_export.verify.loss.gate import bound_checks, number_checks


def loss(ratio: float, kl: float) -> MethodLoss:
    return MethodLoss(8, 1016, 4.0, 4.0 * ratio, ratio, 0.01, kl, 0.02)


@pytest.mark.parametrize(
    ("bound", "found", "statuses"),
    [
        (NO_BOUND, loss(9.0, 9.0), {}),
        (LossBound(max_kl=0.42), loss(9.0, 0.42), {"KL bound": "passed"}),
        (LossBound(max_kl=0.42), loss(1.0, 0.4201), {"KL bound": "failed"}),
        (LossBound(None, 1.5), loss(1.5, 9.0), {"perplexity bound": "passed"}),
        (LossBound(None, 1.5), loss(1.5001, 0.0), {"perplexity bound": "failed"}),
        (LossBound(0.1, 1.5), loss(1.6, 0.05), {"perplexity bound": "failed", "KL bound": "passed"}),
        (LossBound(0.1, 1.5), loss(math.nan, math.nan), {"perplexity bound": "failed", "KL bound": "failed"}),
        (LossBound(math.inf), loss(1.0, math.nan), {"KL bound": "failed"}),
        (LossBound(0.0, 1.0), loss(1.0, 0.0), {"perplexity bound": "passed", "KL bound": "passed"}),
    ],
)
def test_bounds(bound: LossBound, found: MethodLoss, statuses: dict[str, str]) -> None:
    checks = bound_checks(found, bound)
    assert {c.name: c.status for c in checks} == statuses


def test_a_check_says_what_was_measured_and_asked() -> None:
    ratio, kl = bound_checks(loss(1.5203, 0.0412), LossBound(0.1, 1.05))
    assert ratio.detail == "perplexity × 1.5203 ± 0.0100 on held-out text, above the 1.05 asked for"
    assert kl.detail == "KL 0.0412 ± 0.0200 on held-out text, within the 0.1 asked for"


@pytest.mark.parametrize(("ratio", "kl"), [(math.nan, 0.1), (1.0, math.nan), (math.inf, 0.1)])
def test_a_loss_that_is_no_number_fails_without_a_bound(ratio: float, kl: float) -> None:
    (check,) = number_checks(loss(ratio, kl))
    assert (check.name, check.status) == ("method loss", "failed") and "on held-out data" in check.detail
    assert number_checks(loss(9.0, 9.0)) == ()


def test_a_likeness_that_is_no_number_fails() -> None:
    like = Likeness(8, "documents", (Measure("cosine of x", 0.9, 0.1, 8), Measure("KL", math.nan, 0.1, 8)))
    assert [c.detail for c in number_checks(like)] == ["KL is nan on held-out data"]
    assert number_checks(Likeness(8, "documents", like.measures[:1])) == ()


def test_of_one_document_no_error_is_said() -> None:
    one = replace(loss(1.5, 0.2), documents=1, kl_se=0.0)
    (check,) = bound_checks(one, LossBound(max_kl=0.3))
    assert check.detail == "KL 0.2000 on held-out text, within the 0.3 asked for"
