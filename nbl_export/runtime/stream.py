"""A batch of ragged rows in a decoder: one prefill, then decode steps with one token per row.

The stream owns the KV cache and hides how the runtime pads and stores it, so that PyTorch, ONNX Runtime and
TensorRT, with a growing or a static cache, have one interface and are compared in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32, I64
from nbl_export.batch.padding import left_padded, one_more, prefix_mask, right_padded
from nbl_export.runtime.decoder import KV, Decoder

if TYPE_CHECKING:
    from typing_extensions import Self


class Stream(Protocol):
    """The interface that :func:`~nbl_export.verify.parity.decoder.compare_streams` compares."""

    @property
    def kv_layers(self) -> tuple[int, ...] | None:
        """The model's layer indices of the cache entries, in cache order; None without a cache."""

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        """Start a new batch with ``rows`` of token ids: logits [all tokens of all rows, vocab], row after row."""

    def decode(self, tokens: Sequence[int]) -> F32:
        """One more token for each row: logits [rows, vocab]."""

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        """The cache, and which of its slots [rows, slots] are not padding.

        Keys and values [rows, heads, slots, head_dim] of each of ``kv_layers``, then each state [rows, …].
        """

    def reserve(self, tokens: int) -> None:
        """From the next prefill on, no row is longer than ``tokens``; a growing cache has nothing to do."""


@runtime_checkable
class Extending(Stream, Protocol):
    """A stream whose rows can be extended by several tokens at once, and one row by several continuations."""

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        """Replace the batch by new rows: row ``owners[i]`` of the batch followed by ``rows[i]`` (at least one token).

        Returns logits [all tokens of ``rows``, vocab], row after row.
        """

    def fork(self) -> Self:
        """A stream with the same rows and the same cache, which can be extended without changing this one."""


@runtime_checkable
class LastLogits(Stream, Protocol):
    """A stream that can compute only the last logits of a prefill."""

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        """Like :meth:`prefill`, but only the logits [rows, vocab] of each row's last token."""


class Forking:
    """A stream whose steps replace its cache and never overwrite it, so a shallow copy is an independent fork."""

    def fork(self) -> Self:
        return copy.copy(self)

    def reserve(self, tokens: int) -> None:
        return None


class PastStream(Forking):
    """A stream over a stateless :class:`Decoder`: padding on the left, the returned cache is the next input."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._past: Any = ()

    @property
    def kv_layers(self) -> tuple[int, ...]:
        return self.decoder.kv_layers

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        logits: F32 = self._run(self._begin(rows))[self._mask.astype(bool)]
        return logits

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        return self._run(self._begin(rows), num_logits=1)[:, -1]

    def _begin(self, rows: Sequence[NDArray[Any]]) -> I64:
        self._past = self.decoder.empty_past(len(rows))
        ids, self._mask, self._positions = left_padded(rows)
        return ids

    def decode(self, tokens: Sequence[int]) -> F32:
        ids, self._mask, self._positions = one_more(tokens, self._mask, self._positions)
        return self._run(ids)[:, 0]

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        lengths = np.array([len(row) for row in rows])
        ids, offsets = right_padded(rows)
        real = prefix_mask(lengths, ids.shape[1])
        picked = np.asarray(owners)
        self._past = tuple(tuple(side[picked] for side in entry) for entry in self._past)
        self._mask = np.concatenate([self._mask[picked], real.astype(np.int64)], axis=1)
        # Padding gets the row's last position, so that the next token's position follows from it.
        self._positions = self._positions[picked, -1:] + 1 + np.minimum(offsets, lengths[:, None] - 1)
        return self._run(ids)[real]

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return self._past, self._mask.astype(bool)

    def _run(self, ids: I64, num_logits: int = 0) -> F32:
        output = self.decoder(ids, self._mask, self._positions, self._past, num_logits)
        self._past = output.present
        return output.logits


class UncachedStream:
    """A stream over a model without a KV cache: every step computes all tokens again.

    ``forward`` computes logits [batch, sequence, vocab] from left-padded ids, mask and positions.
    """

    kv_layers = None

    def __init__(self, forward: Callable[[I64, I64, I64], F32]) -> None:
        self._forward = forward
        self._rows: list[NDArray[Any]] = []

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._rows = list(rows)
        logits, mask = self._run()
        return logits[mask]

    def decode(self, tokens: Sequence[int]) -> F32:
        self._rows = [np.append(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        return self._run()[0][:, -1]

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return (), np.zeros((len(self._rows), 0), dtype=bool)

    def reserve(self, tokens: int) -> None:
        return None

    def _run(self) -> tuple[F32, BOOL]:
        ids, mask, positions = left_padded(self._rows)
        return self._forward(ids, mask, positions), mask.astype(bool)
