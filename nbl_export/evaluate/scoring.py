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
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbl_export.runtime.stream import Stream

T = TypeVar("T")
Tokens = tuple[int, ...]
# The size of a batch is limited by its logits, which the runtime computes for every token.
LOGITS_BYTES = 256 * 2**20
# A shared prefill costs a second pass, which is not worth it if fewer tokens than this are saved.
_WORTH_SHARING = 16
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


@dataclass
class _Group:
    """One context and its distinct continuations."""

    context: Tokens
    continuations: list[Tokens] = field(default_factory=list)

    @property
    def row(self) -> Tokens:
        return self.context + self.continuations[0][:-1]

    @property
    def branches(self) -> list[Tokens]:
        """The tokens to run after the context: continuations without their last token, whose logits are not needed."""
        return [c[:-1] for c in self.continuations if len(c) > 1]


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
    fitted = [_fit(pair, limits.positions) for pair in pairs]
    asked: dict[Tokens, dict[Tokens, list[int]]] = {}
    scores = [Scored(0.0, True)] * len(pairs)
    for i, pair in enumerate(fitted):
        if pair.continuation:
            asked.setdefault(pair.context, {}).setdefault(pair.continuation, []).append(i)
        else:
            advance(1)
    groups = [_Group(context, list(continuations)) for context, continuations in asked.items()]
    extending = stream if stream.extends else None
    shared = [g for g in groups if extending and _worth_sharing(g, limits)]
    is_shared = {id(g) for g in shared}
    rows = [row for g in groups if id(g) not in is_shared for row in _rows_of(g)]

    def store(batch: Sequence[_Group], found: Sequence[Sequence[Scored]]) -> None:
        for group, own in zip(batch, found, strict=True):
            for continuation, score in zip(group.continuations, own, strict=True):
                indices = asked[group.context][continuation]
                for i in indices:
                    scores[i] = score
                advance(len(indices))

    for batch in _batches(shared, lambda g: len(g.context), limits):
        assert extending is not None  # otherwise nothing is shared
        store(batch, _score_shared(extending, batch, limits))
    for batch in _batches(rows, lambda g: len(g.row), limits):
        store(batch, _score_rows(stream, batch))
    return scores


def _fit(pair: Pair, positions: int) -> Pair:
    if not pair.context:
        raise ValueError("a continuation is scored after one token at least")
    # The last token is predicted, not read, so a row may have one more token than positions.
    continuation = pair.continuation[-positions:]
    room = positions + 1 - len(continuation)
    return Pair((pair.context + pair.continuation[: -len(continuation) or None])[-room:], continuation)


def _worth_sharing(group: _Group, limits: Limits) -> bool:
    # A long row is read in chunks, so that its logits fit into memory; this also uses the cache.
    long = len(group.row) > limits.tokens
    saved = (len(group.continuations) - 1) * len(group.context)
    return long or (bool(group.branches) and saved >= _WORTH_SHARING)


def _rows_of(group: _Group) -> list[_Group]:
    """Rows without a shared prefill; all continuations of one token use the context's last logits."""
    single: list[Tokens] = [c for c in group.continuations if len(c) == 1]
    longer = [_Group(group.context, [c]) for c in group.continuations if len(c) > 1]
    return longer + ([_Group(group.context, single)] if single else [])


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


def _score_rows(stream: Stream, groups: Sequence[_Group]) -> list[list[Scored]]:
    rows = [_row(g.row) for g in groups]
    stream.reserve(max(map(len, rows)))
    logits = np.split(stream.prefill(rows), np.cumsum([len(r) for r in rows])[:-1])
    return [
        [_scored(row[len(g.context) - 1 :], c) for c in g.continuations]
        for g, row in zip(groups, logits, strict=True)
    ]


def _score_shared(stream: Stream, groups: Sequence[_Group], limits: Limits) -> list[list[Scored]]:
    contexts = [_row(g.context) for g in groups]
    branches = [(i, c) for i, g in enumerate(groups) for c in g.continuations if len(c) > 1]
    stream.reserve(max(map(len, contexts)) + max((len(c) for _, c in branches), default=0))
    last = last_logits(stream, contexts, limits.tokens)
    found = {(i, c): last[i][None] for i, g in enumerate(groups) for c in g.continuations}
    for batch in _batches(branches, lambda branch: len(branch[1]), limits):
        fork = stream.fork()
        rows = [_row(c[:-1]) for _, c in batch]
        logits = np.split(fork.extend([i for i, _ in batch], rows), np.cumsum([len(r) for r in rows])[:-1])
        for (i, c), row in zip(batch, logits, strict=True):
            found[i, c] = np.concatenate([last[i][None], row])
    return [[_scored(found[i, c], c) for c in group.continuations] for i, group in enumerate(groups)]


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
    fitted = [_Group(prompt[-(limits.positions - most) :], [(i,)]) for i, prompt in enumerate(prompts)]
    written: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(fitted, lambda g: len(g.context), limits):
        owners = [g.continuations[0][0] for g in batch]
        rows = [_row(g.context) for g in batch]
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
        advance(len(batch))
    return written


def _row(tokens: Tokens) -> NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)
