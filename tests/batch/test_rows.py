"""A batch, its rows, and the batch of them again: by hand, on either side, of tokens and of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbl_export.batch.names import MASK, PIXELS, POSITIONS, TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import batch_of_rows, real_positions, rows_of_batch

ROWS: list[dict[str, Any]] = [
    {TOKENS: np.array([[7, 8, 9]]), TOKEN_TYPES: np.array([[0, 1, 1]])},
    {TOKENS: np.array([[4]]), TOKEN_TYPES: np.array([[1]])},
    {TOKENS: np.array([[5, 6]]), TOKEN_TYPES: np.array([[0, 1]])},
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


@pytest.mark.parametrize(("left", "expected"), [(False, RIGHT), (True, LEFT)], ids=["right", "left"])
def test_rows_become_a_batch_and_rows_again(left: bool, expected: dict[str, Any]) -> None:
    batch = batch_of_rows(ROWS, pad=9, left=left)
    assert as_lists(batch) == expected
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert [as_lists(row) for row in rows_of_batch(batch)] == [as_lists(row) for row in ROWS]


def test_positions_are_no_part_of_a_row() -> None:
    batch = {**batch_of_rows(ROWS), POSITIONS: np.arange(9).reshape(3, 3)}
    assert all(set(row) == {TOKENS, TOKEN_TYPES} for row in rows_of_batch(batch))


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


def test_what_is_real_is_what_the_mask_says() -> None:
    batch = batch_of_rows(ROWS, left=True)
    found = real_positions(batch, 3)
    assert found.dtype == bool and found.tolist() == [[bool(m) for m in row] for row in LEFT[MASK]]
