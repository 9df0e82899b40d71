"""Make short rows in which the context alone tells what comes next.

Prompts are full of it: names that come again, tables, JSON, look-ups, examples. Text of the web hardly is, and a loss
on it does not see when a linear layer makes the model forget how to copy: of SmolLM2, layer 18 costs 0.03 nats of prose
and 2.7 of a sequence that repeats. Rows are made of words of the text, so that they suit its language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import hidden_in, words
from nbl_export.calibrate.text import PADDING, CalibrationText, as_tokens, token_ids
from nbl_export.settings.choices import FAR_LOOK_UP

I32 = NDArray[np.int32]
# Tokens of a row, at most: of one that looks far back, and of the others.
FAR, LENGTH = 512, 128
# The shares of a row that looks far back that say something, and that ask for it: what is between is text.
_SAID = 3 / 8
# The share of a row that shows what it is about, and is not counted.
_SHOWN = 3 / 8
_REPEATS = 4
# Different words that rows are made of, at least; a text with fewer gives the rows that need none.
_WORDS = 32


@dataclass(frozen=True)
class SyntheticRow:
    """A row of ``tokens`` [seq] int32 of a ``kind``; ``counted`` [seq] bool are those whose predictions count."""

    kind: str
    tokens: I32
    counted: NDArray[np.bool_]

    @property
    def owner(self) -> I32:
        """Of each token after the first one 0 if it is counted, -1 if not."""
        return np.where(self.counted[1:], 0, PADDING).astype(np.int32)


def synthetic_rows(text: CalibrationText, tokenizer: Any, seed: int) -> list[SyntheticRow]:
    """A row of each kind, and then another one of each, of words of the selection text; the same for a ``seed``."""
    random = Random(seed)
    return [row for _ in range(2) for row in _of_each_kind(text, tokenizer, random)]


def _of_each_kind(text: CalibrationText, tokenizer: Any, random: Random) -> list[SyntheticRow]:
    ids = words(text.selection).reshape(-1)
    length = min(LENGTH, text.selection.shape[1])
    period = max(1, length // _REPEATS)
    repeated = as_tokens(random.choices(np.unique(ids).tolist(), k=period))
    tokens = np.tile(repeated, _REPEATS + 1)[:length]
    rows = [SyntheticRow("repeated tokens", tokens, np.arange(length) >= period)]
    prose = tokenizer.decode(np.roll(ids, -random.randrange(len(ids))).tolist())
    known = list(dict.fromkeys(re.findall(r"[^\W\d_]{3,12}", prose)))
    if len(known) < _WORDS:
        return rows
    texts = {"spaced punctuation": re.sub(r"\s*([^\w\s])\s*", r" \1 ", prose)}
    texts |= {kind: "".join(islice(lines(random, known), length)) for kind, lines in _KINDS.items()}
    for kind, written in texts.items():
        # With the start of a prompt: a model may need it.
        tokens = text.prompt(token_ids(tokenizer, written, length))[:length]
        rows.append(SyntheticRow(kind, tokens, np.arange(len(tokens)) >= int(_SHOWN * length)))
    if text.selection.shape[1] >= FAR // 2:  # in a shorter row nothing is far
        rows.append(_far_look_up(text, tokenizer, random, known))
    return rows


def _far_look_up(text: CalibrationText, tokenizer: Any, random: Random, known: list[str]) -> SyntheticRow:
    """Pairs of words in prose, and at its end the first word of each, after which the second one is counted."""
    length = min(FAR, text.selection.shape[1]) - len(text.start)

    def tokens(written: str) -> list[int]:
        found: list[int] = token_ids(tokenizer, written, length).tolist()
        return found

    said, asked, keys = list[list[int]](), list[tuple[list[int], int]](), random.sample(known, len(known))
    while sum(map(len, said)) < _SAID * length:
        key, value = keys.pop(), random.choice(known)
        said.append(tokens(f"\n{key}: {value}\n"))
        asked.append((tokens(f"\n{key}: {value}"), len(tokens(f"\n{key}:"))))
    questions, counted = list[int](), list[bool]()
    for question, start in random.sample(asked, len(asked)):
        questions += question
        counted += [at >= start for at in range(len(question))]
    room = length - sum(map(len, said)) - len(questions)
    ids = words(text.selection).reshape(-1)
    prose = np.take(ids, random.randrange(len(ids)) + np.arange(room), mode="wrap").tolist()
    row = text.prompt(as_tokens(hidden_in(prose, said, random)[0] + questions))
    return SyntheticRow(FAR_LOOK_UP, row, np.pad(counted, (len(row) - len(counted), 0)))


def _records(random: Random, known: list[str]) -> Iterator[str]:
    keys = random.sample(known, 4)
    yield "[\n"
    while True:
        yield "  {" + ", ".join(f'"{key}": "{random.choice(known)}"' for key in keys) + "},\n"


def _table(random: Random, known: list[str]) -> Iterator[str]:
    yield "| " + " | ".join(random.sample(known, 4)) + " |\n" + "|---" * 4 + "|\n"
    while True:
        yield "| " + " | ".join(random.choices(known, k=4)) + " |\n"


def _look_ups(random: Random, known: list[str]) -> Iterator[str]:
    keys, values = random.sample(known, 8), random.sample(known, 8)
    while True:
        for at in random.sample(range(8), 8):
            yield f"{keys[at]} = {values[at]}\n"


def _examples(random: Random, known: list[str]) -> Iterator[str]:
    while True:
        word = random.choice(known)
        yield f"Word: {word}\nTwice: {word} {word}\nUpper: {word.upper()}\n\n"


_KINDS: Mapping[str, Callable[[Random, list[str]], Iterator[str]]] = {
    "JSON": _records,
    "table": _table,
    "look-up": _look_ups,
    "few-shot": _examples,
}
