"""Long-context retrieval: sentences hidden in held-out text, one of which must be looked up at the end.

    start │ text … The code of the red door is 4821. … text … The code of the blue door is 1093. … text
          │ … The code of the red door is  ──►  4821 ?

A linearized layer mixes no tokens, so looking up is what it may cost. Several codes are hidden, at depths
spread evenly over the context, and the wrong answers are the other codes that stand in it: whoever only
copies some code is right one time in :data:`HIDDEN`. Two scores are taken of each question: *choice*, the
right code is the most likely of those hidden; *exact*, greedy decoding writes the right code. Both models
are asked the same questions, which depend on the seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import InputError
from nbl_export.evaluate.scoring import Pair, Scored, Tokens

HIDDEN = 4
_DOORS = ("red", "blue", "green", "white", "black", "brown", "yellow", "purple")
_DIGITS = 4

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Question:
    """A prompt, the codes hidden in it as continuations, and which of them is right.

    ``depth`` is where the right one stands: 0 at the beginning of the text, 1 at its end.
    """

    context: int
    depth: float
    prompt: Tokens
    answers: tuple[Tokens, ...]
    gold: int


@dataclass(frozen=True)
class Filler:
    """What codes are hidden in: ``start`` [n], which a prompt begins with, and ``text`` [tokens]."""

    start: NDArray[np.int32]
    text: NDArray[np.int32]


def ask(filler: Filler, encode: Encode, context: int, count: int, seed: int) -> list[Question]:
    """``count`` questions of exactly ``context`` tokens, the longest answer included.

    The depth of what is asked goes round the :data:`HIDDEN` parts of the context. Raises
    :class:`InputError` for a context that has no room for the sentences and as much text again.
    """
    if context < (least := least_context(filler, encode)):
        raise InputError(
            f"--retrieval-contexts has {context} tokens; this model's tokenizer needs {least} at least to hide "
            f"{HIDDEN} sentences in text."
        )
    rng = random.Random(f"{seed}:{context}")
    return [_question(filler, encode, context, i % HIDDEN, rng) for i in range(count)]


def least_context(filler: Filler, encode: Encode) -> int:
    """The shortest context: what is hidden and asked, by the longest names, and as much text again."""
    sentence = max(len(encode(f"\n{_asking(door)} {10**_DIGITS - 1}.\n")) for door in _DOORS)
    return 2 * ((HIDDEN + 1) * sentence + len(filler.start))


def _question(filler: Filler, encode: Encode, context: int, gold: int, rng: random.Random) -> Question:
    doors = rng.sample(_DOORS, HIDDEN)
    codes = [str(c) for c in rng.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), HIDDEN)]
    hidden = [encode(f"\n{_asking(door)} {code}.\n") for door, code in zip(doors, codes, strict=True)]
    question = encode(f"\n{_asking(doors[gold])}")
    answers = tuple(tuple(encode(f"\n{_asking(doors[gold])} {code}")[len(question) :]) for code in codes)
    spoken = sum(map(len, hidden)) + len(question) + max(map(len, answers)) + len(filler.start)
    room = context - spoken
    begin = rng.randrange(len(filler.text))
    text = np.take(filler.text, np.arange(begin, begin + room), mode="wrap").tolist()
    places = [int((part + rng.random()) / HIDDEN * room) for part in range(HIDDEN)]
    prompt = filler.start.tolist()
    for before, after, sentence in zip([0, *places], places, hidden, strict=False):
        prompt += text[before:after] + sentence
    prompt += text[places[-1] :] + question
    return Question(context, places[gold] / room, tuple(prompt), answers, gold)


def _asking(door: str) -> str:
    return f"The code of the {door} door is"


@dataclass(frozen=True)
class Answers:
    """Of each question: whether the right code is the most likely of those hidden, and whether greedy writes it."""

    choice: tuple[float, ...]
    exact: tuple[float, ...]


def answer(score: Callable[[Sequence[Pair]], Sequence[Scored]], questions: Sequence[Question]) -> Answers:
    """Ask ``score``, which is :func:`~nbl_export.evaluate.scoring.log_likelihoods` of a model.

    Greedy decoding writes a code exactly if each of its tokens is the most likely one after those before.
    """
    pairs = [Pair(q.prompt, a) for q in questions for a in q.answers]
    scores = list(score(pairs))
    choice, exact = [], []
    for i, question in enumerate(questions):
        own = scores[i * HIDDEN : (i + 1) * HIDDEN]
        best = max(range(HIDDEN), key=lambda j: own[j].log_likelihood)
        choice.append(float(best == question.gold))
        exact.append(float(own[question.gold].greedy))
    return Answers(tuple(choice), tuple(exact))
