"""One row of tokens in a graph, as a text that grows: what is in its KV cache is not read again.

turn 1   [prompt ────────][answer ────]
turn 2   [prompt ────────][answer ────][next message ──][answer …]      the same beginning: only the rest is read
turn 3   [prompt, written differently ─────────────────────────]        another beginning: all of it is read
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nbl_export.evaluate.scoring import Limits, last_logits
from nbl_export.runtime.ort import OrtStaticStream
from nbl_export.runtime.stream import Extending, Stream

_UNBOUNDED = 1 << 40  # tokens


class Row(Protocol):
    """What a runtime does for one row of tokens. Logits are [vocab], after the last token.

    ``grows``: the cache has room for any number of tokens. ``extends``: several tokens can be added at once.
    """

    grows: bool
    extends: bool

    def begin(self, tokens: Sequence[int], room: int) -> NDArray[Any]:
        """Read ``tokens`` into an empty cache that will hold ``room`` tokens."""

    def go_on(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Read ``tokens`` after those that were read."""


class StreamRow:
    """A row in a stream, whose logits are ``vocab`` wide."""

    def __init__(self, stream: Stream, vocab: int) -> None:
        # A pass has no more tokens than its logits have room for.
        self._stream, self._most = stream, Limits(_UNBOUNDED, vocab).tokens
        self.grows = not isinstance(stream, OrtStaticStream)
        self.extends = isinstance(stream, Extending)

    def begin(self, tokens: Sequence[int], room: int) -> NDArray[Any]:
        self._stream.reserve(room)
        row = np.array(tokens, dtype=np.int64)
        logits: NDArray[Any] = last_logits(self._stream, [row], self._most)[0]
        return logits

    def go_on(self, tokens: Sequence[int]) -> NDArray[Any]:
        last: NDArray[Any]
        if len(tokens) == 1:
            last = self._stream.decode(list(tokens))[0]
            return last
        assert isinstance(self._stream, Extending)
        most, row = self._most, np.array(tokens, dtype=np.int64)
        for at in range(0, len(row), most):
            last = self._stream.extend([0], [row[at : at + most]])[-1].copy()
        return last


class Reader:
    """Logits after a text, of which only what is not yet in the cache is read.

    ``positions`` is the model's number of them, None for no bound. ``ran`` counts the tokens that were really read.
    """

    def __init__(self, row: Row, positions: int | None) -> None:
        self.positions, self.ran = positions, 0
        self._row, self._room = row, 0
        # None while the row is working: what an interrupted pass left in the cache is not known.
        self._tokens: list[int] | None = None

    def read(self, tokens: Sequence[int], more: int = 0) -> NDArray[Any]:
        """Logits [vocab] after ``tokens``, the text from its beginning, which ``more`` tokens are to follow."""
        known, self._tokens = self._tokens, None
        before = len(known) if known is not None else 0
        rest = list(tokens[before:])
        if (
            0 < before < len(tokens)
            and known == list(tokens[:before])
            and len(tokens) <= self._room
            and (len(rest) == 1 or self._row.extends)
        ):
            logits = self._row.go_on(rest)
        else:
            self._room = self._room_for(len(tokens) + more)
            rest = list(tokens)
            logits = self._row.begin(tokens, self._room)
        self.ran += len(rest)
        self._tokens = list(tokens)
        return logits

    def add(self, token: int) -> NDArray[Any]:
        """Logits [vocab] after one more token."""
        assert self._tokens is not None, "nothing was read before"
        if len(self._tokens) >= self._room:
            return self.read([*self._tokens, token])
        known, self._tokens = self._tokens, None
        logits = self._row.go_on([token])
        self.ran += 1
        known.append(token)
        self._tokens = known
        return logits

    def _room_for(self, tokens: int) -> int:
        if self._row.grows:
            return _UNBOUNDED
        if tokens <= self._room:
            return self._room
        wanted = max(tokens, 2 * self._room)  # a text that grows by a little is not read anew each time
        return wanted if self.positions is None else min(wanted, self.positions)
