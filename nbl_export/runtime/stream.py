"""Step a batch of ragged rows through a decoder: one prefill, then decode steps with one token per row.

The stream owns the KV cache and hides how the runtime pads and stores it, so that PyTorch, ONNX Runtime, TensorRT and
the engines of other forms have one interface and are compared in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import BOOL, F32, I64, left_padded, one_more, prefix_mask, right_padded

# Keys and values of a layer, or one state of a layer that is not softmax attention.
KV = tuple[F32, ...]


class Stream:
    """What can be stepped. ``kv_layers`` are the model's layers of the cache entries, in order; None without a cache.

    One that ``extends`` adds several tokens at once, and several continuations to one row. ``memory_bytes`` are those
    of cache and work space, as far as the runtime tells.
    """

    kv_layers: tuple[int, ...] | None = None
    extends = False
    memory_bytes = 0

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        """Start a new batch with ``rows`` of token ids: logits [all tokens of all rows, vocab], row after row."""
        raise NotImplementedError

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        """Like :meth:`prefill`, but only the logits [rows, vocab] of each row's last token."""
        # A copy, so that the logits of all tokens are freed after this call.
        last: F32 = self.prefill(rows)[np.cumsum([len(row) for row in rows]) - 1]
        return last

    def decode(self, tokens: Sequence[int]) -> F32:
        """One more token for each row: logits [rows, vocab]."""
        raise NotImplementedError

    def time_prefill(self, rows: Sequence[NDArray[Any]]) -> None:
        """What of a prefill is timed: it is finished on return, its logits may stay on the device."""
        self.prefill_last(rows)

    def time_step(self, tokens: Sequence[int]) -> None:
        """The same of a decode step."""
        self.decode(tokens)

    def rewind(self, length: int) -> bool:
        """Have of each row its first ``length`` tokens alone; returns False where that needs a new prefill."""
        return False

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        """Replace the batch by new rows: row ``owners[i]`` of the batch followed by ``rows[i]`` (at least one token).

        Returns logits [all tokens of ``rows``, vocab], row after row. A runtime that extends one row at a time keeps
        the batch where there are several.
        """
        raise NotImplementedError

    def fork(self) -> Self:
        """A stream with the same rows and cache, which can be extended without changing this one.

        Steps replace a cache and never overwrite it, so a shallow copy is independent.
        """
        return copy.copy(self)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        """The cache, and which of its slots [rows, slots] are not padding.

        Keys and values [rows, heads, slots, head_dim] of each of ``kv_layers``, then each state [rows, …].
        """
        raise NotImplementedError

    def reserve(self, tokens: int) -> None:
        """From the next prefill on, no row is longer than ``tokens``; a growing cache has nothing to do."""


class LeftPadded(Stream):
    """A stream whose runtime takes all rows as one batch, padded on the left."""

    _mask: I64
    _positions: I64

    def _empty(self, rows: int) -> None:
        """Have an empty cache for so many rows."""
        raise NotImplementedError

    def _run(self, ids: I64, num_logits: int = 0) -> F32:
        """Logits [rows, tokens, vocab] of ``ids``, all or the last ``num_logits``; mask and positions know them."""
        raise NotImplementedError

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        logits: F32 = self._run(self._begin(rows))[self._mask.astype(bool)]
        return logits

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        return self._run(self._begin(rows), num_logits=1)[:, -1]

    def _begin(self, rows: Sequence[NDArray[Any]]) -> I64:
        self._empty(len(rows))
        ids, self._mask, self._positions = left_padded(rows)
        return ids

    def decode(self, tokens: Sequence[int]) -> F32:
        ids, self._mask, self._positions = one_more(tokens, self._mask, self._positions)
        return self._run(ids)[:, 0]


@dataclass(frozen=True)
class DecoderOutput:
    """``logits`` [batch, sequence, vocab] and the cache: per cached layer keys and values [batch, heads, total,
    head_dim], then each state [batch, …] of layers that keep some.
    """

    logits: F32
    present: tuple[KV, ...]


class Decoder(Protocol):
    """A function from tokens and KV cache to logits and KV cache: PyTorch's model, or a graph with a growing cache."""

    @property
    def kv_layers(self) -> tuple[int, ...]: ...

    def empty_past(self, batch: int) -> Any:
        """An empty cache."""

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV], num_logits: int = 0
    ) -> DecoderOutput:
        """Run ``input_ids`` [batch, sequence] after ``past``; the mask covers past and sequence.

        Returns logits of the last ``num_logits`` positions, 0 for all. A decoder without this option returns all.
        """


class PastStream(LeftPadded):
    """A stream over a stateless :class:`Decoder`: the returned cache is the next input."""

    extends = True

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.kv_layers = decoder, decoder.kv_layers
        self._past: Any = ()

    def _empty(self, rows: int) -> None:
        self._past = self.decoder.empty_past(rows)

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


class UncachedStream(Stream):
    """A stream over a model without a KV cache: every step computes all tokens again.

    ``forward`` computes logits [batch, sequence, vocab] from left-padded ids, mask and positions.
    """

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

    def _run(self) -> tuple[F32, BOOL]:
        ids, mask, positions = left_padded(self._rows)
        return self._forward(ids, mask, positions), mask.astype(bool)


class RowStream(Stream):
    """A stream whose runtime takes one row at a time: each has a cache of its own.

    A subclass has ``_empty()``, the cache of a row that has not begun; ``_logits(tokens, cache)`` [tokens, vocab] of
    the next tokens of its row; ``_sides(cache)``, keys and values [1, heads, tokens, head_dim] of each attention that
    has any.
    """

    kv_layers: tuple[int, ...]
    _empty: Callable[[], Any]
    _logits: Callable[[NDArray[Any], Any], F32]
    _sides: Callable[[Any], list[tuple[F32, F32]]]

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._caches = [self._empty() for _ in rows]
        self._lengths = np.zeros(len(rows), dtype=np.int64)
        return self._read(rows)

    def decode(self, tokens: Sequence[int]) -> F32:
        return self._read([np.array([token]) for token in tokens])

    def _read(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._lengths = self._lengths + np.array([len(row) for row in rows])
        read = [self._logits(row, cache) for row, cache in zip(rows, self._caches, strict=True)]
        return np.concatenate(read)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        slots = int(self._lengths.max()) if self.kv_layers else 0

        def joined(sides: Sequence[F32]) -> F32:
            # Zeros where a row is shorter.
            missing = [((0, 0), (0, 0), (0, slots - side.shape[2]), (0, 0)) for side in sides]
            return np.concatenate(list(map(np.pad, sides, missing)))

        layers = zip(*(self._sides(cache) for cache in self._caches), strict=True)
        found = [tuple(joined(sides) for sides in zip(*rows, strict=True)) for rows in layers]
        return found, prefix_mask(self._lengths, slots)
