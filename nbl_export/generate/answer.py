"""One answer: tokens after a prompt until the model ends it, or there is no room, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass

from nbl_export.errors import InputError
from nbl_export.generate.reader import Reader
from nbl_export.generate.sampling import Sampler
from nbl_export.generate.text import TextOfTokens

# Why an answer is over: the model ended it, or there may be or can be no more tokens, or nobody asked for more.
ENDED, MOST, FULL, STOPPED = "ended", "max-tokens", "positions", "stopped"


class TooLong(InputError):
    """A prompt of more ``tokens`` than the model has ``positions``."""

    def __init__(self, tokens: int, positions: int, remedy: str = "make it shorter") -> None:
        super().__init__(
            f"The prompt has {tokens:,} tokens, and the model {positions:,} positions: {remedy}."
        )
        self.tokens, self.positions = tokens, positions


@dataclass(frozen=True)
class Figures:
    """Seconds of reading what was new of a prompt, and of reading generated tokens, with how many there were."""

    prompt_tokens: int
    read_tokens: int
    prefill_seconds: float
    decoded_tokens: int
    decode_seconds: float

    @property
    def prefill_rate(self) -> float | None:
        """Tokens per second."""
        return self.read_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second; None if none was decoded, since the first one comes of the prefill."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else None


class Answer:
    """An answer of ``reader`` to ``prompt``, a text from its beginning.

    ``text`` and ``tokens`` are what there is so far; ``why`` it is over is empty until it is.
    """

    def __init__(
        self,
        reader: Reader,
        prompt: Sequence[int],
        text_of: Callable[[Sequence[int]], TextOfTokens],
        sampler: Sampler,
        stops: Collection[int],
        most: int,
    ) -> None:
        if reader.positions is not None and len(prompt) > reader.positions:
            raise TooLong(len(prompt), reader.positions)
        self._reader, self._prompt, self._sampler = reader, list(prompt), sampler
        self._text_of, self._stops, self._most = text_of(prompt), stops, most
        self._read = self._decoded = 0
        self._prefill = self._decode = 0.0
        self.text = self.why = ""
        self.tokens: list[int] = []

    @property
    def figures(self) -> Figures:
        return Figures(len(self._prompt), self._read, self._prefill, self._decoded, self._decode)

    def pieces(self) -> Generator[str, None, None]:
        """The text, piece by piece; a piece is empty where a token says nothing yet."""
        try:
            for piece in self._pieces():
                self.text += piece
                yield piece
        finally:
            self.why = self.why or STOPPED

    def _pieces(self) -> Iterator[str]:
        reader, positions = self._reader, self._reader.positions
        before, start = reader.ran, time.perf_counter()
        logits = reader.read(self._prompt, self._most)
        self._prefill, self._read = time.perf_counter() - start, reader.ran - before
        while True:
            token = self._sampler(logits)
            self.tokens.append(token)
            if token in self._stops:
                self.why = ENDED
                break
            yield self._text_of.add(token)
            if len(self.tokens) >= self._most:
                self.why = MOST
                break
            if positions is not None and len(self._prompt) + len(self.tokens) > positions:
                self.why = FULL
                break
            start = time.perf_counter()
            logits = reader.add(token)
            self._decode += time.perf_counter() - start
            self._decoded += 1
        yield self._text_of.end()
