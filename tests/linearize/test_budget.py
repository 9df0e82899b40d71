"""Which K a budget allows, read off curves that rise, and some that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from nbl_export.errors import BudgetError
from nbl_export.linearize.selection import (
    CurvePoint,
    Loss,
    keeps,
    largest_within,
    loss_curve,
)
from nbl_export.records import to_json
from nbl_export.settings import NO_BUDGET, Budget


def loss(kl: float = 0.0, ratio: float = 1.0) -> Loss:
    return Loss(kl, kl / 10, math.log(ratio), 0.01)


def points(kls: Sequence[float]) -> list[CurvePoint]:
    return [CurvePoint.of(range(k), loss(kl)) for k, kl in enumerate(kls, 1)]


@pytest.mark.parametrize(
    ("budget", "found", "kept"),
    [
        (Budget(max_kl=0.2), loss(kl=0.2), True),
        (Budget(max_kl=0.2), loss(kl=0.2001), False),
        (Budget(max_perplexity_ratio=1.1), loss(ratio=1.0999), True),
        (Budget(max_perplexity_ratio=1.1), loss(ratio=1.1001), False),
        (Budget(max_perplexity_ratio=1.1), loss(kl=9.0, ratio=0.9), True),
        (Budget(0.2, 1.1), loss(0.1, 1.2), False),
        (Budget(0.2, 1.1), loss(0.3, 1.0), False),
        (Budget(0.2, 1.1), loss(0.1, 1.0), True),
        (Budget(min_speedup=9.0), loss(99.0, 99.0), True),
        (Budget(max_kl=0.2), loss(kl=math.nan), False),
    ],
)
def test_a_loss_is_kept_or_not(budget: Budget, found: Loss, kept: bool) -> None:
    assert keeps(budget, found) is kept


def test_a_budget_that_cannot_be_kept_ends_like_a_failed_gate() -> None:
    assert BudgetError("x").exit_code == 1


# the curve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kls", "bound", "best"),
    [
        ([0.1, 0.2, 0.3], 0.2, 2),
        ([0.1, 0.2, 0.3], 0.05, 0),
        ([0.1, 0.2, 0.3], 1.0, 3),
        # It is not strictly rising: a larger K may cost less than a smaller one.
        ([0.1, 0.3, 0.2, 0.4], 0.2, 3),
        ([0.3, 0.3, 0.1], 0.2, 3),
        ([], 1.0, 0),
    ],
)
def test_the_largest_k_within(kls: list[float], bound: float, best: int) -> None:
    assert largest_within(points(kls), Budget(max_kl=bound)) == best


def followed(kls: Sequence[float], budget: Budget, count: int | None = None) -> list[CurvePoint]:
    return loss_curve(
        lambda k: range(k), lambda layers: loss(kls[len(layers) - 1]), count or len(kls), budget
    )


@pytest.mark.parametrize(
    ("kls", "length"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 5),  # two points within, and three beyond
        ([0.9] * 7, 3),
        ([0.1] * 7, 7),
        ([0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1], 7),  # it comes back once, and not in time again
        ([0.9, 0.9], 2),
    ],
)
def test_a_curve_is_followed_a_little_beyond_its_budget(kls: list[float], length: int) -> None:
    found = followed(kls, Budget(max_kl=0.2))
    assert [p.k for p in found] == list(range(1, length + 1))
    assert [p.layers for p in found] == [tuple(range(k)) for k in range(1, length + 1)]
    assert [p.kl for p in found] == kls[:length]


def test_a_curve_without_a_bound_goes_to_its_end() -> None:
    assert len(followed([9.0] * 6, NO_BUDGET)) == 6
    assert len(followed([9.0] * 6, Budget(min_speedup=2.0), 4)) == 4
    assert loss_curve(lambda k: range(k), lambda _: loss(), 0, NO_BUDGET) == []


def test_nothing_beyond_the_end_of_a_curve_is_measured() -> None:
    asked: list[int] = []

    def measure(layers: Sequence[int]) -> Loss:
        asked.append(len(layers))
        return loss(float(len(layers)))

    loss_curve(lambda k: range(k), measure, 9, Budget(max_kl=1.5))
    assert asked == [1, 2, 3, 4]


def test_a_point_in_the_report() -> None:
    said = to_json(replace(CurvePoint.of((7, 3), loss(0.5, 1.25)), prefill_speedup=1.5))
    assert said["layers"] == [3, 7] and said["k"] == 2
    assert (said["kl"], said["kl_se"]) == (0.5, 0.05)
    assert said["perplexity_ratio"] == pytest.approx(1.25)
    assert said["perplexity_ratio_se"] == pytest.approx(1.25 * 0.01)
    assert (said["prefill_speedup"], said["decode_speedup"]) == (1.5, None)
