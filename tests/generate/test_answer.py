"""An answer ends where it should, its figures are of what was computed, and tokens are drawn as transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from nbl_export.errors import InputError
from nbl_export.evaluate.scoring import Limits
from nbl_export.generate.answer import ENDED, FULL, MOST, STOPPED, Generated, generate_answer, sampler
from nbl_export.generate.prompts import TextOfTokens

VOCAB = 50


class Counting:
    """The token after t is t + 1."""

    kv_layers = ()
    room = 0

    def prefill(self, rows: Sequence[Any]) -> Any:
        return np.stack([self.decode([t])[0] for row in rows for t in row])

    def decode(self, tokens: Sequence[int]) -> Any:
        return np.eye(VOCAB, dtype=np.float32)[[t + 1 for t in tokens]]

    def reserve(self, tokens: int) -> None:
        self.room = tokens


class Words:
    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f"{t}," for t in tokens)


def answer(
    prompt: Sequence[int],
    positions: int = 1000,
    stops: Sequence[int] = (),
    most: int = 5,
    hears: int = 99,
    stream: Any = None,
) -> tuple[Generated, list[str]]:
    heard: list[str] = []

    def told(piece: str) -> bool:
        heard.append(piece)
        return len(heard) < hears

    text, limits = TextOfTokens(Words(), prompt), Limits(positions, VOCAB)
    found = generate_answer(
        "base", stream or Counting(), prompt, text, sampler(), set(stops), most, limits, told
    )
    assert "".join(heard) == found.text
    return found, heard


def test_it_has_as_many_tokens_as_asked() -> None:
    stream = Counting()
    found, heard = answer([3, 4], stream=stream)
    assert heard == ["5,", "6,", "7,", "8,", "9,"] and stream.room == 7
    assert (found.graph, found.tokens, found.why) == ("base", (5, 6, 7, 8, 9), MOST)
    figures = found.figures
    # The first token comes of the prompt, and the last one is not read.
    assert (figures.prompt_tokens, figures.decoded_tokens) == (2, 4)
    assert figures.prefill_rate == pytest.approx(2 / figures.prefill_seconds)
    assert figures.decode_rate == pytest.approx(4 / figures.decode_seconds)
    assert answer([3], most=1)[0].figures.decode_rate is None


@pytest.mark.parametrize("stops", [[7], [30, 7, 9]])
def test_any_stop_token_ends_it_and_is_not_text(stops: list[int]) -> None:
    found, _ = answer([3, 4], stops=stops)
    assert (found.text, found.tokens, found.why) == ("5,6,", (5, 6, 7), ENDED)


@pytest.mark.parametrize(("positions", "tokens"), [(2, (5,)), (3, (5, 6)), (6, (5, 6, 7, 8, 9))])
def test_it_ends_at_the_last_position(positions: int, tokens: tuple[int, ...]) -> None:
    """The last token is predicted at the last position, and has none itself, as in transformers."""
    stream = Counting()
    found, _ = answer([3, 4], positions, stream=stream)
    assert (found.tokens, found.why) == (tokens, FULL if len(tokens) < 5 else MOST)
    assert stream.room == min(positions, 7)


def test_a_prompt_that_is_too_long_is_refused_with_numbers() -> None:
    with pytest.raises(
        InputError, match=r"^The prompt has 3 tokens, and the model 2 positions: make it shorter\.$"
    ):
        answer([1, 2, 3], 2)


def test_an_answer_that_is_left_is_as_long_as_it_was_heard() -> None:
    found, heard = answer([3, 4], hears=2)
    assert (found.text, found.why, heard) == ("5,6,", STOPPED, ["5,", "6,"])


# sampling -----------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32) * 3
DRAWS = 40_000


def expected(logits: Any, temperature: float, top_p: float) -> Any:
    """The probabilities that transformers samples with."""
    scores = torch.from_numpy(np.array(logits))[None].double()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    return torch.softmax(TopPLogitsWarper(top_p)(None, scores), -1)[0].numpy()


@pytest.mark.parametrize("how", [(0, 1.0), (1e-300, 1.0), (5e-324, 0.5), (9.0, 1e-300)])
def test_no_temperature_and_no_probability_is_greedy(how: tuple[float, float]) -> None:
    choose = sampler(*how, seed=3)
    assert [choose(row) for row in LOGITS] == [int(row.argmax()) for row in LOGITS]


def test_a_seed_is_a_sequence() -> None:
    one, same, other = (
        [s(row) for row in LOGITS] for s in (sampler(1.0, 0.9, 1), sampler(1.0, 0.9, 1), sampler(1.0, 0.9, 2))
    )
    assert one == same != other


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (2.0, 1.0), (1.5, 0.5)])
def test_shares_are_those_that_transformers_samples_with(temperature: float, top_p: float) -> None:
    logits = LOGITS[0][:12]
    choose, probabilities = sampler(temperature, top_p, 0), expected(logits, temperature, top_p)
    counts = np.bincount([choose(logits) for _ in range(DRAWS)], minlength=len(logits))
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(probabilities))
    # Five standard deviations of each share.
    bound = 5 * np.sqrt(probabilities * (1 - probabilities) / DRAWS)
    assert np.all(np.abs(counts / DRAWS - probabilities) <= bound + 1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="logits are not finite"):
        sampler(1.0)(np.array([0.0, value, 1.0]))
