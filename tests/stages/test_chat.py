"""A chat: every answer is that of its whole conversation, of each graph its own, and what was read is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.stages.chat import Chat
from tests.talking import TEMPLATE

ASKED = ["Once upon a time", " Then the dog", " They went"]
COUNT = 12


@pytest.fixture(params=["genai", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "genai":
        pytest.importorskip(
            "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
        )
    return str(request.param)


def settings(**asked: Any) -> api.ChatSettings:
    return api.ChatSettings(**{"max_tokens": COUNT, **asked})


def turn(chat: Chat, text: str, together: bool = True) -> dict[str, str]:
    texts = dict.fromkeys(chat.graphs, "")
    for graph, piece in chat.ask(text, together):
        texts[graph] += piece
    assert texts == {a.graph: a.text for a in chat.answers}
    return texts


def conversation(texts: list[str], answers: list[str]) -> str:
    """What TEMPLATE writes, without the start token, which a raw prompt may have."""
    ended = [f"{asked}{answer}</s>" for asked, answer in zip(texts, answers, strict=False)]
    return "<s>" + "".join(ended) + texts[-1]


@pytest.mark.parametrize("together", [True, False])
def test_each_answer_is_that_of_the_whole_conversation(
    talking_out: Path, runtime: str, together: bool
) -> None:
    assert "eos_token" in TEMPLATE
    with api.chat(talking_out, settings(runtime=runtime)) as chat:
        assert chat.graphs == ("base", "linearized") and set(chat.runtimes) == set(chat.graphs)
        said: dict[str, list[str]] = {"base": [], "linearized": []}
        for number, text in enumerate(ASKED):
            found = turn(chat, text, together)
            for answer in chat.answers:
                whole = conversation(ASKED[: number + 1], said[answer.graph])
                asked = api.GenerateSettings(answer.graph, COUNT, raw=True, runtime=runtime)
                (expected,) = api.generate(talking_out, whole, asked)
                assert answer.tokens == expected.tokens
                if number:
                    assert answer.figures.read_tokens < answer.figures.prompt_tokens / 2
            for graph, text_of in found.items():
                said[graph].append(text_of)
    assert said["base"] != said["linearized"]


def test_one_token_of_each_in_turn_or_one_after_the_other(talking_out: Path) -> None:
    with api.chat(talking_out, settings()) as chat:
        graphs = [graph for graph, _ in chat.ask(ASKED[0])]
        assert graphs[:6] == ["base", "linearized"] * 3
        chat.reset()
        graphs = [graph for graph, _ in chat.ask(ASKED[0], together=False)]
        assert graphs == sorted(graphs)


def test_a_template_that_rewrites_what_was_said_is_read_anew(talking_out: Path, monkeypatch: Any) -> None:
    """As those that leave out what a model thought before."""
    changed = TEMPLATE.replace("{{ m.content }}", "{{ m.content | upper if loop.last else m.content }}", 1)
    from nbl_export.stages import talking

    load = talking._tokenizer

    def other(folder: Path, trust: bool) -> Any:
        tokenizer = load(folder, trust)
        tokenizer.chat_template = changed
        return tokenizer

    monkeypatch.setattr(talking, "_tokenizer", other)
    with api.chat(talking_out, settings(graph="base")) as chat:
        first = turn(chat, ASKED[0])["base"]
        turn(chat, ASKED[1])
        (answer,) = chat.answers
    whole = f"<s>{ASKED[0]}{first}</s>{ASKED[1].upper()}"
    (expected,) = api.generate(talking_out, whole, api.GenerateSettings("base", COUNT, raw=True))
    assert answer.tokens == expected.tokens
    assert answer.figures.read_tokens == answer.figures.prompt_tokens


def test_an_answer_that_is_ended_remains_as_far_as_it_is(talking_out: Path) -> None:
    with api.chat(talking_out, settings(graph="base")) as chat:
        pieces = chat.ask(ASKED[0])
        heard = [next(pieces)[1] for _ in range(4)]
        pieces.close()
        (answer,) = chat.answers
        assert (answer.text, answer.why) == ("".join(heard), "stopped") and answer.text
        turn(chat, ASKED[1])
        (answer,) = chat.answers
    whole = conversation(ASKED[:2], ["".join(heard)])
    (expected,) = api.generate(talking_out, whole, api.GenerateSettings("base", COUNT, raw=True))
    assert answer.tokens == expected.tokens


def test_an_interrupt_in_the_middle_of_a_pass_loses_nothing_but_the_answer(
    talking_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbl_export.generate.reader import Reader

    with api.chat(talking_out, settings(graph="base")) as chat:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Reader, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            list(chat.ask("Never heard"))
        assert turn(chat, ASKED[0])["base"]
        (answer,) = chat.answers
    (expected,) = api.generate(talking_out, f"<s>{ASKED[0]}", api.GenerateSettings("base", COUNT, raw=True))
    assert answer.tokens == expected.tokens


def test_too_long_is_refused_with_numbers_and_the_chat_goes_on(talking_out: Path) -> None:
    with api.chat(talking_out, settings()) as chat:
        with pytest.raises(InputError, match=r"tokens, and the model 512 positions: make it shorter\.$"):
            chat.ask("a " * 600)
        before = turn(chat, ASKED[0])
        with pytest.raises(InputError, match="512 positions: make it shorter, or begin anew"):
            chat.ask("a " * 600)
        chat.reset()
        assert turn(chat, ASKED[0]) == before


def test_a_system_message_begins_anew(talking_out: Path, stories_out: Path) -> None:
    def tokens() -> tuple[int, ...]:
        """How long the prompt was, and what was answered."""
        turn(chat, ASKED[0])
        return chat.answers[0].figures.prompt_tokens, *chat.answers[0].tokens

    with api.chat(talking_out, settings(graph="base", system="The cat was sad. One day")) as chat:
        with_system = tokens()
        chat.reset()
        assert tokens() == with_system  # it stays
        chat.reset("")
        without = tokens()
        chat.reset("The cat was sad. One day")
        assert tokens() == with_system and without[0] < with_system[0]
    with api.chat(stories_out, settings(graph="base")) as chat:
        assert not chat.has_template
        turn(chat, ASKED[0])
        with pytest.raises(InputError, match="A system message has no place"):
            chat.reset("Be kind")


def test_plain_text_is_continued(stories_out: Path) -> None:
    with api.chat(stories_out, settings(graph="base")) as chat:
        first = turn(chat, ASKED[0])["base"]
        second = turn(chat, "Then")["base"]
    (expected,) = api.generate(stories_out, f"{ASKED[0]}{first}\nThen", api.GenerateSettings("base", COUNT))
    assert second == expected.text
