"""Tokens of images beside those of text."""

from __future__ import annotations

import numpy as np

from nbl_export.batch.media_ids import FIRST, are_media, words


def test_words_are_the_text_without_its_images() -> None:
    rows = np.array([[1, FIRST, 2], [FIRST + 1, FIRST + 2, 3]], dtype=np.int32)
    assert are_media(rows).tolist() == [[False, True, False], [True, True, False]]
    assert words(rows).tolist() == [[1, 2, 3], [1, 2, 3]] and words(rows).dtype == np.int32


def test_text_alone_is_itself() -> None:
    rows = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert words(rows) is rows
