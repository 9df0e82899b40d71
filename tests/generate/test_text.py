"""Text piece by piece: together it is what the tokenizer decodes, and no piece has half a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.generate.text import TextOfTokens
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model

TEXTS = [
    "Once upon a time",
    "Zoë – naïve «café» 模型",
    "\N{GRINNING FACE}\N{WAVING HAND SIGN} hi  there\n\n\tx",
    "a\ufffdb",
    "",
]


@pytest.fixture(scope="module", params=["byte fallback", "byte level"])
def tokenizer(request: pytest.FixtureRequest, stories_folder: Path, tiny_folder: Path) -> Any:
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


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "One day, a", "Hé"])
def test_pieces_are_the_text(tokenizer: Any, text: str, prompt: str) -> None:
    both = ids(tokenizer, prompt + text)
    for cut in range(len(both) + 1):
        before, tokens = both[:cut], both[cut:]
        found = pieces(tokenizer, before, tokens)
        if not whole(tokenizer, [], before).endswith("\ufffd"):
            assert "".join(found) == whole(tokenizer, before, tokens)


def test_half_a_character_is_held_back(tokenizer: Any) -> None:
    found = pieces(tokenizer, ids(tokenizer, "a"), face(tokenizer))
    assert found == ["", "", "", "\N{GRINNING FACE}", ""]


def test_where_a_text_ends_within_a_character_that_is_shown(tokenizer: Any) -> None:
    found = pieces(tokenizer, ids(tokenizer, "a"), face(tokenizer)[:-1])
    assert set(found[:-1]) == {""} and set(found[-1]) == {"\ufffd"}


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back(tokenizer: Any) -> None:
    half = face(tokenizer)[-1]
    found = pieces(tokenizer, ids(tokenizer, "a"), [half] * 20 + ids(tokenizer, "b"))
    assert any(found[:19]) and "".join(found).rstrip().endswith("b")


def test_a_continuation_keeps_its_space_and_special_tokens_have_no_text(tokenizer: Any) -> None:
    first, second = ids(tokenizer, "Once upon a time there"), ids(tokenizer, "Once upon a time")
    rest = first[len(second) :]
    assert "".join(pieces(tokenizer, second, rest)) == " there"
    stop = tokenizer.eos_token_id
    assert "".join(pieces(tokenizer, second, [stop, *rest, stop])) == " there"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_comes_out_whole(data: st.DataObject, tokenizer: Any) -> None:
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    tokens = ids(tokenizer, "a" + text)
    found = pieces(tokenizer, tokens[:0], tokens)
    assert "".join(found) == whole(tokenizer, [], tokens)
