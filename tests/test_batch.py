"""Batches, padding, choices and tokens of images, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbl_export.batch import (
    FIRST,
    MASK,
    PIXELS,
    POSITIONS,
    TOKEN_TYPES,
    TOKENS,
    are_media,
    batch_of_rows,
    differing,
    left_padded,
    moved,
    prefix_mask,
    prefix_padded,
    real_positions,
    right_padded,
    rows_of_batch,
    shortfall,
    words,
)

RAGGED = [np.array([7, 8, 9], np.int32), np.array([4], np.int32), np.array([5, 6], np.int32)]
ROWS: list[dict[str, Any]] = [
    {TOKENS: row[None], TOKEN_TYPES: np.array([types])}
    for row, types in zip(RAGGED, ([0, 1, 1], [1], [0, 1]), strict=True)
]
# Padded with 9, which is a token of a row too.
RIGHT = {
    TOKENS: [[7, 8, 9], [4, 9, 9], [5, 6, 9]],
    TOKEN_TYPES: [[0, 1, 1], [1, 0, 0], [0, 1, 0]],
    MASK: [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
}
LEFT = {
    TOKENS: [[7, 8, 9], [9, 9, 4], [9, 5, 6]],
    TOKEN_TYPES: [[0, 1, 1], [0, 0, 1], [0, 0, 1]],
    MASK: [[1, 1, 1], [0, 0, 1], [0, 1, 1]],
}


def as_lists(batch: Any) -> dict[str, Any]:
    return {name: array.tolist() for name, array in batch.items()}


def test_padding_by_hand() -> None:
    left, (ids, positions), prefix = (
        pad(RAGGED, pad=9) for pad in (left_padded, right_padded, prefix_padded)
    )
    everywhere = [[0, 1, 2]] * 3
    assert [a.tolist() for a in left] == [LEFT[TOKENS], LEFT[MASK], [[0, 1, 2], [0, 0, 0], [0, 0, 1]]]
    assert [ids.tolist(), positions.tolist()] == [RIGHT[TOKENS], everywhere]
    assert [a.tolist() for a in prefix] == [RIGHT[TOKENS], RIGHT[MASK], everywhere]
    assert {a.dtype for a in (*left, ids, positions, *prefix)} == {np.dtype(np.int64)}
    assert prefix_mask(np.array([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]


@pytest.mark.parametrize(("left", "expected"), [(False, RIGHT), (True, LEFT)], ids=["right", "left"])
def test_rows_become_a_batch_and_rows_again(left: bool, expected: dict[str, Any]) -> None:
    batch = batch_of_rows(ROWS, pad=9, left=left)
    assert as_lists(batch) == expected
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert [as_lists(row) for row in rows_of_batch(batch)] == [as_lists(row) for row in ROWS]
    found = real_positions(batch, 3)
    assert found.dtype == bool and found.tolist() == [[bool(m) for m in row] for row in expected[MASK]]
    # Positions are no part of a row.
    with_positions = {**batch, POSITIONS: np.arange(9).reshape(3, 3)}
    assert all(set(row) == {TOKENS, TOKEN_TYPES} for row in rows_of_batch(with_positions))


def test_without_a_mask_every_token_is_a_row_s_own() -> None:
    ids = np.array([[3, 0, 0], [0, 5, 6]])
    assert [row[TOKENS].tolist() for row in rows_of_batch({TOKENS: ids})] == [[[3, 0, 0]], [[0, 5, 6]]]
    assert real_positions({TOKENS: ids}, 3).tolist() == [[True] * 3] * 2


def test_images_have_no_padding() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    rows = rows_of_batch({PIXELS: images})
    assert [row[PIXELS].shape for row in rows] == [(1, 3, 2, 2)] * 2
    again = batch_of_rows(rows)
    assert set(again) == {PIXELS} and np.array_equal(again[PIXELS], images)
    # Attention sees more positions than the image has pixels in a row; all are real.
    assert real_positions({PIXELS: images}, 5).tolist() == [[True] * 5] * 2


def test_words_are_the_text_without_its_images() -> None:
    rows = np.array([[1, FIRST, 2], [FIRST + 1, FIRST + 2, 3]], dtype=np.int32)
    assert are_media(rows).tolist() == [[False, True, False], [True, True, False]]
    assert words(rows).tolist() == [[1, 2, 3], [1, 2, 3]] and words(rows).dtype == np.int32


INF = float("inf")
SCORES = np.array([[4.0, 3.0, 1.0], [5.0, -INF, 2.0]], np.float32)


@pytest.mark.parametrize(
    ("scores", "chosen", "short"),
    [
        (SCORES, [[0, 1], [2, 0]], [0, 0]),  # the best, in any order
        (SCORES, [[1, 2], [0, 2]], [2, 0]),
        (SCORES, [[0], [2]], [0, 3]),
        (SCORES, [[0, 1], [0, 1]], [0, INF]),  # what is ruled out
        (np.full((1, 3), -INF, np.float32), [[1, 2]], [0]),
        # Of groups the worst counts: [2 tokens, 2 groups, 3].
        (np.stack([SCORES, SCORES[::-1]], axis=1), [[[0], [2]], [[0], [0]]], [3, 0]),
    ],
)
def test_how_far_a_choice_falls_short_of_the_best(scores: Any, chosen: Any, short: list[float]) -> None:
    assert shortfall(scores, np.array(chosen)).tolist() == short


def test_how_far_choices_are_apart() -> None:
    assert moved(SCORES, SCORES) == 0
    assert moved(SCORES, np.array([[4.0, 3.5, 1.0], [5.0, 0.0, -INF]], np.float32)) == 0.5
    one = np.array([[0, 1], [2, 1], [3, 0]])
    assert differing(one, one[:, ::-1]) == 0
    assert differing(one, np.array([[1, 0], [3, 0], [3, 1]])) == 2
