"""Prompts are the tokens that transformers makes of them, with one start token, and every stop token is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.generate.prompts import ASSISTANT, SYSTEM, USER, Prompts, message, stop_tokens
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
    prompts = Prompts(tokenizer)
    expected = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)
        for c in (TURNS, TURNS[1:2])
    ]
    assert prompts.of([TURNS, TURNS[1:2]]) == expected
    assert expected[0].count(tokenizer.bos_token_id) == 1 and expected[0][0] == tokenizer.bos_token_id


def test_raw_is_the_text_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    prompts = Prompts(tokenizer, raw=True)
    assert not prompts.has_template
    assert prompts.of([[message(USER, "Once upon")]]) == [tokenizer("Once upon")["input_ids"]]
    plain = "Be kind.\nHiHello!\nOnce upon"
    assert prompts.of([TURNS]) == [tokenizer(plain)["input_ids"]]


def test_a_start_token_is_not_doubled(tokenizer: Any) -> None:
    """Of a tokenizer that adds one, as Llama's does, and that is given one more."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("<s>Once")["input_ids"][:2] == [1, 1]
    (plain,), (written,) = (Prompts(tokenizer).of([[message(USER, t)]]) for t in ("Once", "<s>Once"))
    assert plain[0] == 1 and plain.count(1) == 1
    assert written[0] == 1 and written.count(1) == 1
    tokenizer.chat_template = TEMPLATE
    assert Prompts(tokenizer).of([TURNS])[0].count(1) == 1


def test_a_template_that_refuses_is_one_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('No system message') }}"
    with pytest.raises(InputError, match=r"fails \(TemplateError: No system message\): give --raw, or use"):
        Prompts(tokenizer).of([TURNS])


def test_no_tokens_are_no_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{% endfor %}"
    with pytest.raises(InputError, match="The prompt has no tokens"):
        Prompts(tokenizer).of([TURNS])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, {2}),
        ({"eos_token_id": 9}, {}, {2, 9}),
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
