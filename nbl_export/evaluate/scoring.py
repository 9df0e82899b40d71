"""Log-likelihoods and greedy continuations of token rows, asked of any stream.

Continuations of one context share its prefill where the stream can go on from one row in several ways
(:class:`~nbl_export.runtime.stream.Extending`):

    context ─► prefill, once ─► last logits ─► first token of every continuation
                     │
                     └─ cache, a copy for each continuation ─► extend ─► the tokens after the first

Where it cannot, every continuation is a row of its own. Rows of like length share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbl_export.runtime.stream import Extending, LastLogits, Stream

T = TypeVar("T")
Tokens = tuple[int, ...]
# Rows of a batch are cut off where their logits, which the runtime makes for every token, would pass this.
LOGITS_BYTES = 256 * 2**20
# A prefill shared by continuations costs a second pass; fewer tokens saved than this are not worth it.
_WORTH_SHARING = 16
# Reading the weights for one more pass costs about as much as this many tokens of padding.
_PASS = 64


@dataclass(frozen=True)
class Pair:
    """A continuation to be scored after a context of one token at least."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Scored:
    """Natural-log likelihood of a continuation, and whether greedy decoding would write exactly it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Limits:
    """``positions``: the most tokens of a row; ``vocab``: the width of the logits; ``batch``: the most rows at once."""

    positions: int
    vocab: int
    batch: int = 16

    @property
    def tokens(self) -> int:
        """The most padded tokens in one pass."""
        return max(64, LOGITS_BYTES // (4 * self.vocab))


@dataclass
class _Group:
    """One context and the different continuations asked of it."""

    context: Tokens
    continuations: list[Tokens] = field(default_factory=list)

    @property
    def row(self) -> Tokens:
        return self.context + self.continuations[0][:-1]

    @property
    def branches(self) -> list[Tokens]:
        """What must be run after the context; the last token of a continuation predicts nothing asked for."""
        return [c[:-1] for c in self.continuations if len(c) > 1]


def log_likelihoods(
    stream: Stream,
    pairs: Sequence[Pair],
    limits: Limits,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[Scored]:
    """Score every pair; ``advance`` is told how many more are done.

    Contexts too long for the model's positions lose their beginning; of a continuation that is itself too
    long only the end is scored. An empty continuation has log-likelihood 0.
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
    extending = stream if isinstance(stream, Extending) else None
    shared = [g for g in groups if extending and _worth_sharing(g, limits)]
    kept = {id(g) for g in shared}
    rows = [part for g in groups if id(g) not in kept for part in _rows_of(g)]

    def keep(batch: Sequence[_Group], found: Sequence[Sequence[Scored]]) -> None:
        for group, own in zip(batch, found, strict=True):
            for continuation, score in zip(group.continuations, own, strict=True):
                places = asked[group.context][continuation]
                for i in places:
                    scores[i] = score
                advance(len(places))

    for batch in _batches(shared, lambda g: len(g.context), limits):
        assert extending is not None  # nothing is shared without
        keep(batch, _score_shared(extending, batch, limits))
    for batch in _batches(rows, lambda g: len(g.row), limits):
        keep(batch, _score_rows(stream, batch))
    return scores


def _fit(pair: Pair, positions: int) -> Pair:
    if not pair.context:
        raise ValueError("a continuation is scored after one token at least")
    # The last token is predicted, not read, so a row holds one more than the positions.
    continuation = pair.continuation[-positions:]
    room = positions + 1 - len(continuation)
    return Pair((pair.context + pair.continuation[: -len(continuation) or None])[-room:], continuation)


def _worth_sharing(group: _Group, limits: Limits) -> bool:
    # A long row is read in parts, so that its logits fit; that too goes on from what is cached.
    long = len(group.row) > limits.tokens
    saved = (len(group.continuations) - 1) * len(group.context)
    return long or (bool(group.branches) and saved >= _WORTH_SHARING)


def _rows_of(group: _Group) -> list[_Group]:
    """Rows without anything shared; continuations of one token all read the context's last logits."""
    single: list[Tokens] = [c for c in group.continuations if len(c) == 1]
    longer = [_Group(group.context, [c]) for c in group.continuations if len(c) > 1]
    return longer + ([_Group(group.context, single)] if single else [])


def _batches(items: Sequence[T], length: Callable[[T], int], limits: Limits) -> Iterator[list[T]]:
    """Items of like length together, the longest first, so that what does not fit fails at once."""
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
        [_scored(part[len(g.context) - 1 :], c) for c in g.continuations]
        for g, part in zip(groups, logits, strict=True)
    ]


def _score_shared(stream: Extending, groups: Sequence[_Group], limits: Limits) -> list[list[Scored]]:
    contexts = [_row(g.context) for g in groups]
    branches = [(i, c) for i, g in enumerate(groups) for c in g.continuations if len(c) > 1]
    stream.reserve(max(map(len, contexts)) + max((len(c) for _, c in branches), default=0))
    last = last_logits(stream, contexts, limits.tokens)
    found = {(i, c): last[i][None] for i, g in enumerate(groups) for c in g.continuations}
    for batch in _batches(branches, lambda branch: len(branch[1]), limits):
        fork = stream.fork()
        rows = [_row(c[:-1]) for _, c in batch]
        logits = np.split(fork.extend([i for i, _ in batch], rows), np.cumsum([len(r) for r in rows])[:-1])
        for (i, c), part in zip(batch, logits, strict=True):
            found[i, c] = np.concatenate([last[i][None], part])
    return [[_scored(found[i, c], c) for c in group.continuations] for i, group in enumerate(groups)]


def last_logits(stream: Stream, rows: Sequence[NDArray[Any]], tokens: int) -> NDArray[Any]:
    """Logits [rows, vocab] after each row of a prefill; a row longer than ``tokens`` is read in parts."""
    last: NDArray[Any]
    if len(rows) == 1 and len(rows[0]) > tokens and isinstance(stream, Extending):
        parts = [rows[0][at : at + tokens] for at in range(0, len(rows[0]), tokens)]
        last = stream.prefill(parts[:1])[-1:].copy()
        for part in parts[1:]:
            last = stream.extend([0], [part])[-1:].copy()
        return last
    if isinstance(stream, LastLogits):
        return stream.prefill_last(rows)
    # A copy: the logits of all tokens need not outlive this call.
    last = stream.prefill(rows)[np.cumsum([len(r) for r in rows]) - 1]
    return last


def _scored(logits: NDArray[Any], continuation: Tokens) -> Scored:
    """``logits[j]`` predicts token j of the continuation; in float64, as a sum of many would round."""
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

    ``finished(i, tokens)`` says whether what was written for prompt i is enough. Prompts that leave no room
    for ``most`` tokens lose their beginning.
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
