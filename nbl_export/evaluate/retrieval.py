"""Long-context retrieval: sentences hidden in held-out text, one of which is asked for at the end.

    start │ text … The code of the red door is 4821. … text … The code of the blue door is 1093. … text
          │ … The code of the red door is  ──►  4821 ?

A linearized layer does not mix tokens, so it may reduce retrieval accuracy. Several codes are hidden, at depths spread
evenly over the context, and the wrong answers are the other hidden codes, so copying a random one is right once in
:data:`HIDDEN`. Each question has two scores: *choice*, the right code is the most likely of the hidden ones; *exact*,
greedy decoding generates the right code. Both models get the same questions, which depend only on the seed.
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
    """A prompt, the hidden codes as continuations, and the index of the right one.

    ``depth`` is the position of the right one: 0 at the start of the text, 1 at its end.
    """

    context: int
    depth: float
    prompt: Tokens
    answers: tuple[Tokens, ...]
    gold: int


@dataclass(frozen=True)
class Filler:
    """The text around the codes: ``start`` [n], the first tokens of a prompt, and ``text`` [tokens]."""

    start: NDArray[np.int32]
    text: NDArray[np.int32]


def ask(filler: Filler, encode: Encode, context: int, count: int, seed: int) -> list[Question]:
    """``count`` questions of exactly ``context`` tokens, including the longest answer.

    The depth of the right code cycles through the :data:`HIDDEN` sections of the context. Raises :class:`InputError`
    for a context that is too short for the sentences and as much text.
    """
    if context < (least := least_context(filler, encode)):
        raise InputError(
            f"--retrieval-contexts has {context} tokens; this model's tokenizer needs {least} at least to hide "
            f"{HIDDEN} sentences in text."
        )
    rng = random.Random(f"{seed}:{context}")
    return [_question(filler, encode, context, i % HIDDEN, rng) for i in range(count)]


def least_context(filler: Filler, encode: Encode) -> int:
    """The minimum context: the hidden sentences and the question, with the longest names, and as much text."""
    sentence = max(len(encode(f"\n{_asking(door)} {10**_DIGITS - 1}.\n")) for door in _DOORS)
    return 2 * ((HIDDEN + 1) * sentence + len(filler.start))


def _question(filler: Filler, encode: Encode, context: int, gold: int, rng: random.Random) -> Question:
    doors = rng.sample(_DOORS, HIDDEN)
    codes = [str(c) for c in rng.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), HIDDEN)]
    hidden = [encode(f"\n{_asking(door)} {code}.\n") for door, code in zip(doors, codes, strict=True)]
    question = encode(f"\n{_asking(doors[gold])}")
    answers = tuple(tuple(encode(f"\n{_asking(doors[gold])} {code}")[len(question) :]) for code in codes)
    fixed = sum(map(len, hidden)) + len(question) + max(map(len, answers)) + len(filler.start)
    room = context - fixed
    begin = rng.randrange(len(filler.text))
    text = np.take(filler.text, np.arange(begin, begin + room), mode="wrap").tolist()
    offsets = [int((section + rng.random()) / HIDDEN * room) for section in range(HIDDEN)]
    prompt = filler.start.tolist()
    for before, after, sentence in zip([0, *offsets], offsets, hidden, strict=False):
        prompt += text[before:after] + sentence
    prompt += text[offsets[-1] :] + question
    return Question(context, offsets[gold] / room, tuple(prompt), answers, gold)


def _asking(door: str) -> str:
    return f"The code of the {door} door is"


@dataclass(frozen=True)
class Answers:
    """For each question: whether the right code is the most likely one, and whether greedy decoding generates it."""

    choice: tuple[float, ...]
    exact: tuple[float, ...]


def answer(score: Callable[[Sequence[Pair]], Sequence[Scored]], questions: Sequence[Question]) -> Answers:
    """Answer the questions with ``score``, :func:`~nbl_export.evaluate.scoring.log_likelihoods` of a model.

    Greedy decoding generates a code if each of its tokens is the most likely one after the previous tokens.
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
