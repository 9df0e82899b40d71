"""Rows that are read one after the other; test_mlx.py and test_transformers.py run models so."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.runtime.stream import RowStream


class Echo(RowStream):
    """Its logits and its keys are the tokens, its values twice as much."""

    kv_layers = (1, 3)

    def _empty(self) -> Any:
        return []

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        cache.extend(tokens.tolist())
        return np.array(tokens, np.float32)[:, None]

    def _length(self, cache: Any) -> int:
        return len(cache)

    def _sides(self, cache: Any, number: int) -> tuple[F32, F32]:
        keys = np.array(cache, np.float32)[None, None, :, None] + 10 * number
        return keys, 2 * keys


def test_each_row_has_a_cache_of_its_own_which_is_padded_to_the_longest() -> None:
    stream = Echo()
    assert stream.prefill([np.array([1, 2, 3]), np.array([4])]).tolist() == [[1], [2], [3], [4]]
    assert stream.decode([5, 6]).tolist() == [[5], [6]]
    pairs, real = stream.cache()
    assert real.tolist() == [[True] * 4, [True, True, False, False]]
    assert len(pairs) == 2
    for number, (keys, values) in enumerate(pairs):
        ten = 10 * number
        assert keys[0, 0, :, 0].tolist() == [1 + ten, 2 + ten, 3 + ten, 5 + ten]
        assert keys[1, 0, :, 0].tolist() == [4 + ten, 6 + ten, 0, 0]
        assert np.array_equal(values, 2 * keys)
    stream.prefill([np.array([7])])
    assert stream.cache()[1].tolist() == [[True]]
