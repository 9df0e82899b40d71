"""Padding on either side, by hand: what is where, and that the rows come back."""

from __future__ import annotations

import numpy as np

from nbl_export.batch.rows import left_padded, prefix_mask, prefix_padded, right_padded

RAGGED = [np.array([7, 8, 9], np.int32), np.array([4], np.int32), np.array([5, 6], np.int32)]


def test_left_padding_by_hand() -> None:
    ids, mask, positions = left_padded(RAGGED, pad=99)
    assert ids.tolist() == [[7, 8, 9], [99, 99, 4], [99, 5, 6]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    assert {a.dtype for a in (ids, mask, positions)} == {np.dtype(np.int64)}


def test_right_padding_by_hand() -> None:
    ids, positions = right_padded(RAGGED, pad=99)
    assert ids.tolist() == [[7, 8, 9], [4, 99, 99], [5, 6, 99]]
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert {a.dtype for a in (ids, positions)} == {np.dtype(np.int64)}
    lengths = [len(r) for r in RAGGED]
    assert prefix_mask(lengths, 4).tolist() == [[True] * n + [False] * (4 - n) for n in lengths]
    assert prefix_mask(np.array([0, 2]), 2).tolist() == [[False, False], [True, True]]


def test_rows_come_back_whatever_the_padding() -> None:
    ids, mask, _ = left_padded(RAGGED, pad=4)  # a token that is in the rows too
    right, _ = right_padded(RAGGED, pad=4)
    for batch, real in ((ids, mask.astype(bool)), (right, prefix_mask([3, 1, 2], 3))):
        found = [row[where].tolist() for row, where in zip(batch, real, strict=True)]
        assert found == [r.tolist() for r in RAGGED]


def test_prefix_padding_is_right_padding_with_its_mask() -> None:
    ids, mask, positions = prefix_padded(RAGGED, pad=99)
    assert ids.tolist() == [[7, 8, 9], [4, 99, 99], [5, 6, 99]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert {a.dtype for a in (ids, mask, positions)} == {np.dtype(np.int64)}
