"""What a tokenizer may hold: the growth of its rules against the library's own result, and those of real models."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from nbl_export.models.tokenizer_growth import _ENCODE as ENCODE
from nbl_export.models.tokenizer_growth import growth, too_much


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*normalizers: dict[str, Any], of: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", of: list(normalizers)}


def special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def template(*pieces: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    known = {"q": {"id": "q", "ids": [1] * ids, "tokens": ["q"] * ids}}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": pair, "special_tokens": known}


def table(*texts: str) -> dict[str, Any]:
    """A table of normalizations without a trie."""
    raw = (4).to_bytes(4, "little") + bytes(4) + b"".join(t.encode() + b"\0" for t in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


TEXT: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
LONGEST = "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647 \u0639\u0644\u064a\u0647 \u0648\u0633\u0644\u0645"  # of U+FDFA
META = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
# As the files of these models have them; a table of normalizations has 320,000 characters.
REAL: dict[str, dict[str, Any]] = {
    "Llama 2": {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))},
    "Llama 3": {
        "pre_tokenizer": sequence(SPLIT, BYTES, of="pretokenizers"),
        "post_processor": sequence(BYTES, template(special("q"), TEXT), of="processors"),
        "decoder": BYTES,
    },
    "Gemma": {
        "normalizer": replace(" ", "▁"),
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
        "post_processor": template(special("q"), TEXT),
        "decoder": sequence(replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, of="decoders"),
    },
    "Qwen": {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence(SPLIT, BYTES, of="pretokenizers")},
    "T5": {
        "normalizer": sequence(table(*[LONGEST] * 4000), replace(" {2,}", "▁", "Regex")),
        "pre_tokenizer": sequence({"type": "WhitespaceSplit"}, META, of="pretokenizers"),
        "post_processor": template(TEXT, special("q")),
        "decoder": META,
    },
    "ALBERT": {
        "normalizer": sequence(
            replace("``", '"'),
            replace("''", '"'),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            table(LONGEST),
            replace(" {2,}", " ", "Regex"),
        ),
        "pre_tokenizer": META,
        "post_processor": template(special("q"), TEXT, special("q")),
    },
    "BERT": {
        "normalizer": {"type": "BertNormalizer", "handle_chinese_chars": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template(special("q"), TEXT, special("q")),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 100},
    },
    "NLLB": {
        "normalizer": sequence(table(LONGEST), replace(" {2,}", " ", "Regex")),
        "pre_tokenizer": META,
        "post_processor": {
            **template(*[special("q")] * 2, TEXT),
            "special_tokens": {str(i): {"id": str(i), "ids": [i], "tokens": [str(i)]} for i in range(210)},
        },
    },
    "umlauts": {"normalizer": sequence(*(replace(c, c.lower() + "e") for c in "ÄÖÜ" * 20))},
    "a vocabulary": {"model": {"type": "BPE", "vocab": {"a" * 50_000: 0}, "merges": [["a", "b"]] * 20_000}},
    "nothing": {"normalizer": None, "padding": None, "post_processor": "x", "model": 7},
}


@pytest.mark.parametrize("name", REAL)
def test_tokenizers_of_real_models_are_within_the_limits(name: str) -> None:
    assert too_much(REAL[name]) is None
    assert growth(REAL[name], ENCODE) <= 72


def test_files_of_real_models_are_within_the_limits(stories_folder: Path, tiny_folder: Path) -> None:
    folders = [stories_folder, tiny_folder, Path(os.environ.get("NBL_EXPORT_MINILM", "none"))]
    for file in (folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()):
        assert too_much(json.loads(file.read_text())) is None, file


DEEP: Any = [[[["a"]]]]
BOMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "a long prefix": ("normalizer", {"type": "Prepend", "prepend": "a" * 50_000_000}),
    "many prefixes": ("normalizer", sequence(*[{"type": "Prepend", "prepend": "a" * 1000}] * 20)),
    "many short prefixes": ("normalizer", sequence(*[{"type": "Prepend", "prepend": "ab"}] * 200)),
    "a long replacement": ("normalizer", replace("a", "b" * 300)),
    "replacements in a row": ("normalizer", sequence(replace("a", "b" * 20), replace("b", "c" * 20))),
    "doubling": ("normalizer", sequence(*[replace("a", "aa")] * 34)),
    "doubling by an expression": ("normalizer", sequence(*[replace(".", "xx", "Regex")] * 34)),
    "an empty pattern": ("normalizer", sequence(*[replace("", "ab")] * 9)),
    "bytes of bytes": ("normalizer", sequence(*[{"type": "ByteLevel"}] * 30)),
    "bytes of bytes in words": ("pre_tokenizer", sequence(*[BYTES] * 30, of="pretokenizers")),
    "a table of long texts": ("normalizer", table("a", "b" * 1000)),
    "a table that is too long": ("normalizer", {"precompiled_charsmap": "A" * 3_000_000}),
    "many tokens": ("post_processor", template(TEXT, special("q"), ids=5_000_000)),
    "a token many times": ("post_processor", template(TEXT, *[special("q")] * 30, ids=20)),
    "a text many times": ("post_processor", template(*[TEXT] * 300)),
    "templates in a row": ("post_processor", sequence(*[template(TEXT, TEXT, TEXT)] * 6, of="processors")),
    "a decoder": ("decoder", sequence(*[replace("a", "aa")] * 34, of="decoders")),
    "a long text of a decoder": ("decoder", {"type": "WordPiece", "prefix": "#" * 20_000}),
    "many rules": ("normalizer", sequence(*[{"type": "NFC"}] * 20_000)),
    "many names": ("padding", {str(i): 0 for i in range(20_000)}),
    "a long name": ("truncation", {"a" * 20_000: 0}),
    "a long suffix": ("model", {"vocab": {}, "end_of_word_suffix": "a" * 20_000}),
    "long words": ("model", {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 10**9}),
    "lists in lists": ("pre_tokenizer", {"a": DEEP * 5000}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_named_by_its_part(bomb: str) -> None:
    part, rules = BOMBS[bomb]
    found = too_much({part: rules})
    assert found is not None and found.startswith(f"has too much in its {part}: ")


def test_parts_multiply_each_other() -> None:
    rules = {"normalizer": replace("a", "b" * 100), "pre_tokenizer": replace("b", "c" * 20)}
    assert too_much({"normalizer": rules["normalizer"]}) is None and too_much(rules) is not None


SEEN = [
    (normalizers.Sequence([normalizers.Replace("a", "bb"), normalizers.Replace("b", "ccc")]), 6, "a"),
    (normalizers.Sequence([normalizers.Replace("a", "bb"), normalizers.Replace("c", "ddd")]), 3, "ac"),
    (normalizers.Sequence([normalizers.Replace("ab", "bbbb"), normalizers.Replace("b", "cc")]), 4, "ab"),
    (normalizers.ByteLevel(), 4, "\U0001f600"),
    (normalizers.Sequence([normalizers.ByteLevel()] * 2), 16, "\U0001f600é"),
    (normalizers.BertNormalizer(), 3, "漢字"),
]


@pytest.mark.parametrize(("normalizer", "bound", "text"), SEEN)
def test_no_text_grows_by_more_than_is_said(normalizer: Any, bound: float, text: str) -> None:
    tokenizer = Tokenizer(WordLevel({}))
    tokenizer.normalizer = normalizer
    found = growth(json.loads(tokenizer.to_str()))
    assert found == bound
    assert 1 < len(normalizer.normalize_str(text * 50)) / (len(text) * 50) <= found


def test_no_word_grows_by_more_than_is_said() -> None:
    tokenizer = Tokenizer(WordLevel({}))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = tokenizer.pre_tokenizer.pre_tokenize_str("\U0001f600" * 50)
    assert len(words[0][0]) == 200 and growth(json.loads(tokenizer.to_str())) == 4
