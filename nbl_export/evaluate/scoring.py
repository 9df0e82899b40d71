"""Log-likelihoods and greedy continuations of token rows, with any stream.

Continuations of one context share its prefill if the stream can extend a row by several continuations
(:class:`~nbl_export.runtime.stream.Stream`):

    context ─► prefill, once ─► last logits ─► first token of every continuation
                     │
                     └─ KV cache, forked for the continuations ─► extend ─► the tokens after the first

Otherwise every continuation is a separate row. Rows of similar length share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbl_export.runtime.stream import Stream

T = TypeVar("T")
Tokens = tuple[int, ...]
# The size of a batch is limited by its logits, which the runtime computes for every token.
LOGITS_BYTES = 256 * 2**20
# One more pass over the weights costs about as much as this many tokens of padding.
_PASS = 64


@dataclass(frozen=True)
class Pair:
    """A continuation to be scored after a context of at least one token."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Scored:
    """Log-likelihood (natural logarithm) of a continuation, and whether greedy decoding would generate it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Limits:
    """``positions``: maximum tokens per row; ``vocab``: width of the logits; ``batch``: maximum rows per batch."""

    positions: int
    vocab: int
    batch: int = 16

    @property
    def tokens(self) -> int:
        """The maximum number of tokens in one pass, including padding."""
        return max(64, LOGITS_BYTES // (4 * self.vocab))


def log_likelihoods(
    stream: Stream,
    pairs: Sequence[Pair],
    limits: Limits,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[Scored]:
    """Score every pair; ``advance`` receives the number of newly finished pairs.

    Contexts too long for the model's positions are truncated at the start; of a continuation that is itself too long,
    only the end is scored. An empty continuation has log-likelihood 0.
    """
    asked: dict[Tokens, dict[Tokens, list[int]]] = {}
    scores = [Scored(0.0, True)] * len(pairs)
    for i, pair in enumerate(pairs):
        context, continuation = _fit(pair, limits.positions)
        if continuation:
            asked.setdefault(context, {}).setdefault(continuation, []).append(i)
        else:
            advance(1)

    def store(context: Tokens, continuation: Tokens, logits: NDArray[Any]) -> None:
        found = _scored(logits, continuation)
        for i in asked[context][continuation]:
            scores[i] = found
        advance(len(asked[context][continuation]))

    shared: list[Tokens] = []
    alone: list[tuple[Tokens, Tokens]] = []
    for context, continuations in asked.items():
        # A long row is read in chunks, so that its logits fit into memory.
        long = len(context) + max(map(len, continuations)) - 1 > limits.tokens
        if stream.extends and (long or len(continuations) > 1):
            shared.append(context)
        else:
            alone += [(context, continuation) for continuation in continuations]
    for batch in _batches(shared, len, limits):
        branches = [(i, continuation) for i, context in enumerate(batch) for continuation in asked[context]]
        stream.reserve(max(map(len, batch)) + max(len(continuation) for _, continuation in branches))
        last = last_logits(stream, [_row(context) for context in batch], limits.tokens)
        for i, continuation in branches:
            if len(continuation) == 1:
                store(batch[i], continuation, last[i][None])
        longer = [branch for branch in branches if len(branch[1]) > 1]
        for some in _batches(longer, lambda branch: len(branch[1]), limits):
            # The logits after the last token of a continuation are not needed.
            rows = [_row(continuation[:-1]) for _, continuation in some]
            logits = stream.fork().extend([i for i, _ in some], rows)
            for (i, continuation), own in zip(some, _split(logits, rows), strict=True):
                store(batch[i], continuation, np.concatenate([last[i][None], own]))
    for group in _batches(alone, lambda pair: len(pair[0]) + len(pair[1]) - 1, limits):
        rows = [_row((*context, *continuation[:-1])) for context, continuation in group]
        stream.reserve(max(map(len, rows)))
        for (context, continuation), own in zip(group, _split(stream.prefill(rows), rows), strict=True):
            store(context, continuation, own[len(context) - 1 :])
    return scores


def _fit(pair: Pair, positions: int) -> tuple[Tokens, Tokens]:
    if not pair.context:
        raise ValueError("a continuation is scored after one token at least")
    # The last token is predicted, not read, so a row may have one more token than positions.
    continuation = pair.continuation[-positions:]
    room = positions + 1 - len(continuation)
    return (pair.context + pair.continuation[: -len(continuation) or None])[-room:], continuation


def _split(logits: NDArray[Any], rows: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The logits of each of ``rows``, which a stream gives row after row."""
    return np.split(logits, np.cumsum([len(row) for row in rows])[:-1])


def _batches(items: Sequence[T], length: Callable[[T], int], limits: Limits) -> Iterator[list[T]]:
    """Items of similar length together, longest first, so that a batch that does not fit fails at once."""
    batch: list[T] = []
    width = padding = 0
    for item in sorted(items, key=length, reverse=True):
        padding += width - length(item)
        full = len(batch) == limits.batch or (len(batch) + 1) * width > limits.tokens
        if batch and (full or padding > _PASS):
            yield batch
            batch = []
        if not batch:
            width, padding = length(item), 0
        batch.append(item)
    if batch:
        yield batch


def last_logits(stream: Stream, rows: Sequence[NDArray[Any]], tokens: int) -> NDArray[Any]:
    """Logits [rows, vocab] after each row of a prefill; a row longer than ``tokens`` is read in chunks."""
    last: NDArray[Any]
    if len(rows) == 1 and len(rows[0]) > tokens and stream.extends:
        chunks = [rows[0][at : at + tokens] for at in range(0, len(rows[0]), tokens)]
        last = stream.prefill(chunks[:1])[-1:].copy()
        for chunk in chunks[1:]:
            last = stream.extend([0], [chunk])[-1:].copy()
        return last
    return stream.prefill_last(rows)


def _scored(logits: NDArray[Any], continuation: Tokens) -> Scored:
    """``logits[j]`` predicts token j of the continuation; float64 avoids rounding in long sums."""
    values = logits[: len(continuation)].astype(np.float64)
    targets = np.array(continuation)
    best = values.max(axis=-1)
    log_sum = best + np.log(np.exp(values - best[:, None]).sum(axis=-1))
    found = values[np.arange(len(targets)), targets] - log_sum
    return Scored(float(found.sum()), bool(np.all(values.argmax(axis=-1) == targets)))


def greedy(
    stream: Stream,
    prompts: Sequence[Tokens],
    most: int,
    finished: Callable[[int, list[int]], bool],
    limits: Limits,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[list[int]]:
    """Up to ``most`` tokens for each prompt by greedy decoding.

    ``finished(i, tokens)`` says whether prompt i is finished after the generated ``tokens``. Prompts too long for
    ``most`` more tokens are truncated at the start.
    """
    if most >= limits.positions:
        raise ValueError("no room for a prompt")
    fitted = [prompt[-(limits.positions - most) :] for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    for owners in _batches(range(len(fitted)), lambda i: len(fitted[i]), limits):
        rows = [_row(fitted[i]) for i in owners]
        stream.reserve(max(map(len, rows)) + most)
        tokens = last_logits(stream, rows, limits.tokens).argmax(axis=-1)
        going = dict.fromkeys(owners)
        for step in range(most):
            for owner, token in zip(owners, tokens, strict=True):
                if owner in going:
                    written[owner].append(int(token))
                    if finished(owner, written[owner]):
                        del going[owner]
            if not going or step == most - 1:
                break
            tokens = stream.decode([int(t) for t in tokens]).argmax(axis=-1)
        advance(len(owners))
    return written


def _row(tokens: Tokens) -> NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)
