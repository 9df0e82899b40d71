"""Prompts are the tokens that transformers makes of them, stop tokens are found, and pieces of text are the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.generate.prompts import (
    ASSISTANT,
    SYSTEM,
    USER,
    TextOfTokens,
    message,
    prompt_tokens,
    stop_tokens,
)
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from tests.talking import TEMPLATE

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
        ("{% if %}", r"fails \(TemplateSyntaxError: .*\): give --raw"),
        ("{{ messages.__class__.__mro__ }}", r"fails \(SecurityError: .*\): give --raw"),
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
        ({"eos_token_id": [-1, None, "x", True, 2.5]}, {"eos_token_id": None}, {2}),
        ([], {"text_config": 3}, {2}),
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
