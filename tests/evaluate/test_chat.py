"""Chat templates: the same text as transformers writes, and none that takes the time or memory of the evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.evaluate import chat as module
from nbl_export.evaluate.chat import ChatTemplate
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from tests.models.spoiled import one_sentence

TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<me>{% endif %}"
)
ASKED = [{"role": "user", "content": "Hé \N{GRINNING FACE}?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "Well"}]
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "in the second": "{% if messages[0].content == 'again' %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
    "memory": "{{ 'a' * (10 ** 11) }}",
    "doubling": "{% set n = namespace(x='a' * 1000000) %}{% for i in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "length": "{{ 'a' * 10000000 }}",
    "format": "{{ '%999999999999d'|format(1) }}",
    "division": "{{ 1 / 0 }}",
    "raised": "{{ raise_exception('\x1b[31mX') }}",
    "syntax": "{% if",
}


@pytest.fixture(scope="module")
def tokenizer(stories_folder: Path) -> Any:
    return load_tokenizer(find_model(str(stories_folder)))


def test_the_text_is_that_of_transformers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TURNS)
    expected = [
        tokenizer.apply_chat_template(
            history, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt
        )
        for history, prompt in ((ASKED, True), (BEGUN, False))
    ]
    chat = ChatTemplate(tokenizer)
    chat.write([(ASKED, True), (BEGUN, False), (ASKED, True)])
    assert tokenizer.bos_token in expected[0] and expected[0].endswith("<me>")
    # What was written is kept: no other process is started.
    monkeypatch.setattr(module, "in_child", lambda *_: pytest.fail("a child"))
    assert [chat(ASKED), chat(BEGUN, add_generation_prompt=False)] == expected


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_one_sentence(
    tokenizer: Any, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", BOMBS[bomb])
    monkeypatch.setattr(module, "_PATIENCE", 4)
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        ChatTemplate(tokenizer).write([(ASKED, True), ([{"role": "user", "content": "again"}], True)])
    sentence = one_sentence(caught)
    assert time.monotonic() - start < 40
    assert sentence.startswith(f"The chat template of {tokenizer.name_or_path} ")
    assert "leave out --chat-template" in sentence and "\x1b" not in sentence


def test_several_templates_without_a_default(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": TURNS, "tools": TURNS})
    with pytest.raises(InputError, match="is none that is used by default: leave out --chat-template"):
        ChatTemplate(tokenizer)(ASKED)
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": "wrong", "default": TURNS})
    assert ChatTemplate(tokenizer)(ASKED).endswith("<me>")


def test_code_of_the_model_writes_its_own(tokenizer: Any) -> None:
    class Own:
        def apply_chat_template(self, history: Any, **how: Any) -> str:
            return f"{history[0]['content']} {how['add_generation_prompt']}"

    assert ChatTemplate(Own())([{"role": "user", "content": "Hi"}]) == "Hi True"
