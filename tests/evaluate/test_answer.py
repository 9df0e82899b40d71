"""An answer ends where it should, its figures are of what was computed, and tokens are drawn as transformers does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from nbl_export.errors import InputError
from nbl_export.evaluate.answer import (
    ASSISTANT,
    ENDED,
    FULL,
    MOST,
    STOPPED,
    SYSTEM,
    USER,
    Generated,
    Message,
    TextOfTokens,
    generate_answer,
    prompt_tokens,
    sampler,
    stop_tokens,
)
from nbl_export.evaluate.scoring import Limits
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.runtime.stream import Stream
from tests.finished import TEMPLATE

VOCAB = 50


class Counting(Stream):
    """The token after t is t + 1."""

    kv_layers = ()
    room = 0

    def prefill(self, rows: Sequence[Any]) -> Any:
        return np.stack([self.decode([t])[0] for row in rows for t in row])

    def prefill_last(self, rows: Sequence[Any]) -> Any:
        return self.decode([row[-1] for row in rows])

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

    running, limits = stream or Counting(), Limits(positions, VOCAB)
    found = generate_answer("base", running, Words(), prompt, sampler(), set(stops), most, limits, told)
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


# prompts -------------------------------------------------------------------------------------------


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


TURNS = [
    message(SYSTEM, "Be kind."),
    message(USER, "Hi"),
    message(ASSISTANT, "Hello!"),
    message(USER, "Once upon"),
]


@pytest.fixture
def tokenizer(stories_folder: Path) -> Any:
    return load_tokenizer(find_model(str(stories_folder)))


def test_a_conversation_is_what_transformers_makes_of_it(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(tokenizer, TURNS) == expected and expected.count(tokenizer.bos_token_id) == 1


def test_raw_is_the_text_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    assert prompt_tokens(tokenizer, TURNS[3:], raw=True) == tokenizer("Once upon")["input_ids"]
    plain = "Be kind.\nHiHello!\nOnce upon"
    assert prompt_tokens(tokenizer, TURNS, raw=True) == tokenizer(plain)["input_ids"]


def test_a_start_token_is_not_doubled(tokenizer: Any) -> None:
    """Of a tokenizer that adds one, as Llama's does, and that is given one more."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("<s>Once")["input_ids"][:2] == [1, 1]
    plain, written = (prompt_tokens(tokenizer, [message(USER, t)]) for t in ("Once", "<s>Once"))
    assert plain[0] == 1 and plain.count(1) == 1
    assert written[0] == 1 and written.count(1) == 1
    tokenizer.chat_template = TEMPLATE
    assert prompt_tokens(tokenizer, TURNS).count(1) == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('No\\nsystem') }}",
            r"The chat template of .* fails \(TemplateError: No\): give --raw, or use",
        ),
        ("{% for m in messages %}{% endfor %}", "The prompt has no tokens"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(tokenizer: Any, template: str, said: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=said) as caught:
        prompt_tokens(tokenizer, TURNS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, {2}),
        ({"eos_token_id": [9, 10]}, {"eos_token_id": 11}, {2, 9, 10, 11}),
        ({}, {"text_config": {"eos_token_id": [12]}}, {2, 12}),
        ({}, {"eos_token_id": None}, {2}),
    ],
)
def test_every_stop_token_is_found(
    tokenizer: Any, tmp_path: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stop_tokens(tmp_path, tokenizer) == expected


# text piece by piece ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["byte fallback", "byte level"])
def either(request: pytest.FixtureRequest, stories_folder: Path, tiny_folder: Path) -> Any:
    return load_tokenizer(
        find_model(str(stories_folder if request.param == "byte fallback" else tiny_folder))
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def face(tokenizer: Any) -> list[int]:
    """The tokens of one character, after another one."""
    before, both = ids(tokenizer, "a"), ids(tokenizer, "a\N{GRINNING FACE}")
    assert both[: len(before)] == before and len(both) == len(before) + 4
    return both[len(before) :]


def pieces(tokenizer: Any, before: list[int], tokens: list[int]) -> list[str]:
    text = TextOfTokens(tokenizer, before)
    return [*(text.add(t) for t in tokens), text.end()]


def whole(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    def decoded(t: list[int]) -> str:
        return str(tokenizer.decode(t, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decoded([*before, *tokens])[len(decoded(before)) :]


def test_half_a_character_is_held_back_until_the_end(either: Any) -> None:
    assert pieces(either, ids(either, "a"), face(either)) == ["", "", "", "\N{GRINNING FACE}", ""]
    found = pieces(either, ids(either, "a"), face(either)[:-1])
    assert set(found[:-1]) == {""} and set(found[-1]) == {"\ufffd"}


def test_a_continuation_keeps_its_space_and_special_tokens_have_no_text(either: Any) -> None:
    first, second = ids(either, "Once upon a time there"), ids(either, "Once upon a time")
    rest = first[len(second) :]
    stop = either.eos_token_id
    assert "".join(pieces(either, second, [stop, *rest, stop])) == " there"


@pytest.mark.parametrize(
    "text", ["Zoë – naïve «café» 模型", "\N{GRINNING FACE}\N{WAVING HAND SIGN} hi  there\n\n\tx", "a\ufffdb"]
)
def test_a_text_goes_on_from_any_token(either: Any, text: str) -> None:
    both = ids(either, "One day, a" + text)
    for cut in range(len(both) + 1):
        before, tokens = both[:cut], both[cut:]
        if not whole(either, [], before).endswith("\ufffd"):
            assert "".join(pieces(either, before, tokens)) == whole(either, before, tokens)
