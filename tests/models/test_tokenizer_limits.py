"""A tokenizer that takes minutes or all memory is refused in seconds; an ordinary one is used."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.models import tokenizer_limits
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from tests.models.spoiled import one_sentence


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def with_rules(folder: Path, **rules: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **rules}))
    return folder


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


DOUBLING = {"type": "Sequence", "normalizers": [replaced({"String": "a"}, "aa")] * 34}
BOMBS = {
    "doubling": {"normalizer": DOUBLING},
    "a slow expression": {"pre_tokenizer": split("(x+x+)+y")},
    "a slow expression in a decoder": {
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, replaced({"Regex": "(x+x+)+y"}, "")],
        },
    },
    "a slow expression in a normalizer": {"normalizer": replaced({"Regex": "(x+x+)+y"}, "")},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_by_its_limits(folder: Path, bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_limits, "_PATIENCE", 3)
    source = find_model(str(with_rules(folder, **BOMBS[bomb])))
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_tokenizer(source)
    sentence = one_sentence(caught)
    assert time.monotonic() - start < 20
    assert "The tokenizer of" in sentence and "tokenizer.json" in sentence


def template(count: int, ids: int) -> dict[str, Any]:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "q", "type_id": 0}}] * count + [text],
        "pair": [text],
        "special_tokens": {"q": {"id": "q", "ids": [1] * ids, "tokens": ["q"] * ids}},
    }


PREPEND = {"type": "Prepend", "prepend": "a" * 900_000}
TOO_MUCH: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND] * 20}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "Metaspace", "replacement": "b" * 20_000}},
    "post_processor": {"post_processor": template(30, 2_000_000)},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [replaced({"String": "a"}, "aa")] * 34}},
}


@pytest.mark.parametrize("part", TOO_MUCH)
def test_what_says_of_itself_that_it_is_a_bomb_is_not_tried(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_limits, "in_child", lambda *_: pytest.fail("a child"))
    source = find_model(str(with_rules(folder, **TOO_MUCH[part])))
    with pytest.raises(InputError) as caught:
        load_tokenizer(source)
    assert f"has too much in its {part}: " in one_sentence(caught) and source.source in str(caught.value)


def test_many_rules_are_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(tokenizer_limits, "in_child", lambda *asked: tried.append(asked))
    with_rules(folder, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100})
    assert load_tokenizer(find_model(str(folder)))("ab")["input_ids"] and len(tried) == 1


def test_an_ordinary_expression_is_used(folder: Path) -> None:
    words = split(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+")
    source = find_model(str(with_rules(folder, pre_tokenizer=words)))
    assert load_tokenizer(source)("ab cd")["input_ids"]


def test_a_tokenizer_without_expressions_starts_no_child(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_limits, "in_child", lambda *_: pytest.fail("a child"))
    with_rules(folder, normalizer=replaced({"String": " "}, "_"), pre_tokenizer=None)
    assert load_tokenizer(find_model(str(folder)))("ab")["input_ids"]


def with_entry(folder: Path, name: str, value: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    return folder


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;owned\x07", "l strip", ""])
def test_an_option_of_a_token_whose_name_is_none(
    folder: Path, file: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    token = {"id": 5, "content": "x", "special": True, name: False}
    added = {"added_tokens": [token]} if file == "tokenizer.json" else {"added_tokens_decoder": {"5": token}}
    path.write_text(json.dumps({**content, **added}))
    with pytest.raises(InputError) as caught:
        load_tokenizer(find_model(str(folder)))
    sentence = one_sentence(caught)
    assert f"{path} has a token with the option" in sentence and "\x1b" not in sentence
    assert "\x1b" not in "".join(capfd.readouterr())


def test_a_vocabulary_may_have_any_text(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"content": 258, "\x1b[2J": 259}
    path.write_text(json.dumps(content))
    assert load_tokenizer(find_model(str(folder)))("ab")["input_ids"]


@pytest.mark.parametrize("names", [["input_ids", ["attention_mask"]], [5]])
def test_names_of_inputs_that_are_none(folder: Path, names: Any) -> None:
    source = find_model(str(with_entry(folder, "model_input_names", names)))
    with pytest.raises(InputError) as caught:
        load_tokenizer(source)
    assert "model_input_names" in one_sentence(caught)


@pytest.mark.parametrize("value", [{}, [], "x", -5, None])
def test_a_length_of_another_type(folder: Path, value: Any) -> None:
    with_entry(folder, "model_max_length", value)
    source = find_model(str(folder))
    if value is None:
        assert load_tokenizer(source)("ab")["input_ids"]
        return
    with pytest.raises(InputError) as caught:
        load_tokenizer(source)
    assert "model_max_length" in one_sentence(caught)


def with_versions(folder: Path, named: Any) -> Path:
    return with_entry(folder, "fast_tokenizer_files", named)


@pytest.mark.parametrize(
    "named",
    [5, ["../tokenizer.4.0.0.json"], ["sub/tokenizer.4.0.0.json"], [None], {"a": "tokenizer.4.0.0.json"}],
)
def test_a_tokenizer_for_other_releases_that_lies_elsewhere(folder: Path, named: Any) -> None:
    shutil.copy(folder / "tokenizer.json", folder.parent / "tokenizer.4.0.0.json")
    (folder / "sub").mkdir()
    shutil.copy(folder / "tokenizer.json", folder / "sub" / "tokenizer.4.0.0.json")
    with pytest.raises(InputError) as caught:
        load_tokenizer(find_model(str(with_versions(folder, named))))
    assert "fast_tokenizer_files" in one_sentence(caught)


def test_a_tokenizer_for_other_releases_has_the_same_limits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_limits, "_PATIENCE", 3)
    shutil.copy(folder / "tokenizer.json", folder / "kept.json")
    with_rules(folder, **BOMBS["doubling"])
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")
    (folder / "kept.json").rename(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(find_model(str(with_versions(folder, ["tokenizer.4.0.0.json"]))))


def test_no_tokenizer_for_other_releases(folder: Path) -> None:
    assert load_tokenizer(find_model(str(with_versions(folder, []))))("ab")["input_ids"]
