"""Choices of the largest scores, by hand."""

from __future__ import annotations

import numpy as np

from nbl_export.batch.rows import differing, moved, shortfall

INF = float("inf")
SCORES = np.array([[4.0, 3.0, 1.0], [5.0, -INF, 2.0]], np.float32)


def test_the_best_fall_short_of_nothing_in_any_order() -> None:
    assert shortfall(SCORES, np.array([[0, 1], [2, 0]])).tolist() == [0, 0]
    assert shortfall(SCORES, np.array([[1, 2], [0, 2]])).tolist() == [2, 0]
    assert shortfall(SCORES, np.array([[0], [2]])).tolist() == [0, 3]


def test_what_is_ruled_out_falls_short_by_infinity() -> None:
    assert shortfall(SCORES, np.array([[0, 1], [0, 1]])).tolist() == [0, INF]
    nothing = np.full((1, 3), -INF, np.float32)
    assert shortfall(nothing, np.array([[1, 2]])).tolist() == [0]


def test_of_groups_the_worst_counts() -> None:
    groups = np.stack([SCORES, SCORES[::-1]], axis=1)  # [2 tokens, 2 groups, 3]
    assert shortfall(groups, np.array([[[0], [2]], [[0], [0]]])).tolist() == [3, 0]


def test_moved_is_the_largest_difference_of_known_scores() -> None:
    assert moved(SCORES, SCORES) == 0
    assert moved(SCORES, np.array([[4.0, 3.5, 1.0], [5.0, 0.0, -INF]], np.float32)) == 0.5


def test_differing_counts_tokens_not_places() -> None:
    one = np.array([[0, 1], [2, 1], [3, 0]])
    assert differing(one, one[:, ::-1]) == 0
    assert differing(one, np.array([[1, 0], [3, 0], [3, 1]])) == 2
