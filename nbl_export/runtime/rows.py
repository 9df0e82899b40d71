"""A stream whose runtime takes one row at a time: each has a cache of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.runtime.decoder import KV


class RowStream(ABC):
    """A :class:`~nbl_export.runtime.stream.Stream` of rows that are read one after the other."""

    kv_layers: tuple[int, ...]

    def __init__(self) -> None:
        self._caches: list[Any] = []

    @abstractmethod
    def _empty(self) -> Any:
        """The cache of a row that has not begun."""

    @abstractmethod
    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        """Logits [tokens, vocab] of the next ``tokens`` of the row whose ``cache`` it is."""

    @abstractmethod
    def _length(self, cache: Any) -> int:
        """How many tokens a cache has."""

    @abstractmethod
    def _sides(self, cache: Any, number: int) -> tuple[F32, F32]:
        """Keys and values [1, heads, tokens, head_dim] of the attention ``number`` of those that have any."""

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._caches = [self._empty() for _ in rows]
        return self._read(rows)

    def decode(self, tokens: Sequence[int]) -> F32:
        return self._read([np.array([token]) for token in tokens])

    def _read(self, rows: Sequence[NDArray[Any]]) -> F32:
        read = [self._logits(row, cache) for row, cache in zip(rows, self._caches, strict=True)]
        return np.concatenate(read)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        lengths = np.array([self._length(cache) for cache in self._caches])
        longest = int(lengths.max(initial=0))
        found: list[KV] = []
        for number in range(len(self.kv_layers)):
            sides = zip(*(self._sides(cache, number) for cache in self._caches), strict=True)
            keys, values = (np.concatenate([_slots(own, longest) for own in side]) for side in sides)
            found.append((keys, values))
        return found, np.arange(longest)[None] < lengths[:, None]

    def reserve(self, tokens: int) -> None:
        return None


def _slots(own: F32, longest: int) -> F32:
    """One row's keys or values [1, heads, longest, head_dim], with zeros where it is shorter."""
    return np.pad(own, ((0, 0), (0, 0), (0, longest - own.shape[2]), (0, 0)))
