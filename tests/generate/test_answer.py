"""An answer ends where it should, and its figures are of what was computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nbl_export.generate.answer import ENDED, FULL, MOST, STOPPED, Answer, TooLong
from nbl_export.generate.reader import Reader
from nbl_export.generate.sampling import Sampler
from nbl_export.generate.text import TextOfTokens

VOCAB = 50


class Counting:
    """The token after t is t + 1."""

    grows = extends = True

    def begin(self, tokens: Sequence[int], room: int) -> Any:
        return self.go_on(tokens)

    def go_on(self, tokens: Sequence[int]) -> Any:
        return np.eye(VOCAB, dtype=np.float32)[tokens[-1] + 1]


class Words:
    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f"{t}," for t in tokens)


def answer(
    prompt: Sequence[int], positions: int | None = None, stops: Sequence[int] = (), most: int = 5
) -> Answer:
    def text_of(before: Sequence[int]) -> TextOfTokens:
        return TextOfTokens(Words(), before)

    return Answer(Reader(Counting(), positions), prompt, text_of, Sampler(), set(stops), most)


def test_it_has_as_many_tokens_as_asked() -> None:
    found = answer([3, 4])
    assert found.why == "" and list(found.pieces()) == ["5,", "6,", "7,", "8,", "9,", ""]
    assert (found.tokens, found.text, found.why) == ([5, 6, 7, 8, 9], "5,6,7,8,9,", MOST)
    figures = found.figures
    # The first token comes of the prompt, and the last one is not read.
    assert (figures.prompt_tokens, figures.read_tokens, figures.decoded_tokens) == (2, 2, 4)
    assert figures.prefill_rate == pytest.approx(2 / figures.prefill_seconds)
    assert figures.decode_rate == pytest.approx(4 / figures.decode_seconds)


@pytest.mark.parametrize("stops", [[7], [30, 7, 9]])
def test_any_stop_token_ends_it_and_is_not_text(stops: list[int]) -> None:
    found = answer([3, 4], stops=stops)
    assert "".join(found.pieces()) == "5,6," == found.text
    assert (found.tokens, found.why) == ([5, 6, 7], ENDED)


def test_one_token_is_not_decoded() -> None:
    found = answer([3], most=1)
    assert "".join(found.pieces()) == "4,"
    assert (found.figures.decoded_tokens, found.figures.decode_rate) == (0, None)


@pytest.mark.parametrize(("positions", "tokens"), [(2, [5]), (3, [5, 6]), (6, [5, 6, 7, 8, 9])])
def test_it_ends_at_the_last_position(positions: int, tokens: list[int]) -> None:
    """The last token is predicted at the last position, and has none itself, as in transformers."""
    found = answer([3, 4], positions)
    assert list(found.pieces())[-1] == ""
    assert (found.tokens, found.why) == (tokens, FULL if len(tokens) < 5 else MOST)


def test_a_prompt_that_is_too_long_is_refused_with_numbers() -> None:
    with pytest.raises(
        TooLong, match=r"^The prompt has 3 tokens, and the model 2 positions: make it shorter\.$"
    ):
        answer([1, 2, 3], 2)


def test_an_answer_that_is_left_is_as_long_as_it_was_heard() -> None:
    found = answer([3, 4])
    pieces = found.pieces()
    assert [next(pieces), next(pieces)] == ["5,", "6,"]
    pieces.close()
    assert (found.text, found.why) == ("5,6,", STOPPED)
