"""The retrieval check on models whose answers are known: one that looks up, some that cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from nbl_export.errors import InputError
from nbl_export.evaluate.retrieval import HIDDEN, Filler, Question, answer, ask
from nbl_export.evaluate.scoring import Pair, Scored

START = np.array([1], dtype=np.int32)


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.fixture
def filler() -> Filler:
    text = "It was a day like any other, and the sea was calm. " * 40
    return Filler(START, np.array(encode(text), dtype=np.int32))


def model(choose: Callable[[str], str]) -> Callable[[Sequence[Pair]], list[Scored]]:
    """A model that is sure of the code ``choose`` finds in the prompt."""

    def score(pairs: Sequence[Pair]) -> list[Scored]:
        found = [choose(decode(p.context)) == decode(p.continuation).strip() for p in pairs]
        return [Scored(-1.0 if right else -9.0, right) for right in found]

    return score


def looks_up(prompt: str) -> str:
    (door,) = re.findall(r"The code of the (\w+) door is$", prompt)
    (code,) = re.findall(rf"The code of the {door} door is (\d+)\.", prompt)
    return str(code)


def takes_the_last(prompt: str) -> str:
    return str(re.findall(r"door is (\d+)\.", prompt)[-1])


def windowed(prompt: str) -> str:
    """Sees the last half only, and takes the last code where the right one lies before it."""
    half = prompt[len(prompt) // 2 :]
    door = prompt.rsplit(" door", 1)[0].rsplit(" ", 1)[1]
    found = re.findall(rf"The code of the {door} door is (\d+)\.", half)
    return str(found[0]) if found else takes_the_last(prompt)


def test_who_looks_up_is_always_right(filler: Filler) -> None:
    found = answer(model(looks_up), ask(filler, encode, 1000, 40, seed=0))
    assert found.choice == found.exact == (1.0,) * 40


def test_who_only_copies_some_code_is_right_by_chance(filler: Filler) -> None:
    found = answer(model(takes_the_last), ask(filler, encode, 1000, 40, seed=0))
    # What is asked goes round the parts of the context, and the last is right in one of them.
    assert sum(found.choice) == 40 / HIDDEN and sum(found.exact) == 40 / HIDDEN
    indifferent = answer(
        lambda pairs: [Scored(-3.0, False)] * len(pairs), ask(filler, encode, 1000, 40, seed=0)
    )
    assert sum(indifferent.choice) == 40 / HIDDEN and sum(indifferent.exact) == 0


def test_who_sees_half_of_the_context_is_right_about_half_of_the_depths(filler: Filler) -> None:
    questions = ask(filler, encode, 1200, 80, seed=0)
    found = answer(model(windowed), questions)
    by_part = [
        np.mean([c for c, q in zip(found.choice, questions, strict=True) if q.gold == p])
        for p in range(HIDDEN)
    ]
    assert by_part[0] == 0 and by_part[3] == 1


def test_questions_are_as_long_as_asked_and_hide_what_they_ask(filler: Filler) -> None:
    for question in ask(filler, encode, 700, 12, seed=3):
        text = decode(question.prompt)
        assert len(question.prompt) + max(map(len, question.answers)) == 700
        assert question.prompt[0] == 1
        codes = [decode(a).strip() for a in question.answers]
        assert len(set(codes)) == HIDDEN and re.findall(r"door is (\d+)\.", text) == codes
        assert looks_up(text) == codes[question.gold]
        at = text.index(f"is {codes[question.gold]}.") / len(text)
        assert question.gold / HIDDEN <= question.depth <= (question.gold + 1) / HIDDEN
        assert abs(at - question.depth) < 0.25
        assert "\x00" not in text and "the sea was calm" in text


def test_questions_depend_on_the_seed_alone(filler: Filler) -> None:
    def asked(seed: int, context: int = 700) -> list[Question]:
        return ask(filler, encode, context, 6, seed)

    assert asked(0) == asked(0) and asked(0) != asked(1)
    assert ask(filler, encode, 700, 3, 0) == asked(0)[:3]


def test_a_context_too_short_is_refused(filler: Filler) -> None:
    with pytest.raises(
        InputError, match=r"--retrieval-contexts has 100 tokens; .* needs \d+ at least"
    ) as refusal:
        ask(filler, encode, 100, 1, 0)
    least = int(re.findall(r"needs (\d+)", str(refusal.value))[0])
    assert len(ask(filler, encode, least, 20, 0)) == 20
    with pytest.raises(InputError):
        ask(filler, encode, least - 1, 1, 0)
