"""What a ``tokenizer.json`` may hold beside its vocabulary, and how much longer its rules may make a text.

Each rule is judged by what it says, without running it. The tokenizers of GPT-2, Llama 2 and 3, Gemma, Qwen, BERT, T5,
ALBERT and NLLB have a few dozen values, strings of a few hundred characters, and a growth of at most 72.

    rule                                     times as long
    Replace                                  content over pattern; for a regular expression, content + 1
    ByteLevel                                4: the bytes of a letter
    Metaspace, BertNormalizer                2, 3: what is put around a letter
    Precompiled                              the longest text in its table
    a template with a text several times     how often
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# The parts of the file, and what they may hold: values, and characters of one text.
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "model")
_ENCODE, _DECODE = ("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)
_VOCABULARY = ("vocab", "merges")
_VALUES = 10_000
_CHARACTERS = 16_384
_TABLE = 2 << 20  # characters of a table of normalizations; SentencePiece's own has 320,000
_GROWTH = 256
_ADDED = 256  # characters, and tokens, that are put before or after a text
_LETTERS = 1000  # of a word; BERT's have 100
_OF_TYPE = {"ByteLevel": 4.0, "Metaspace": 2.0, "BertNormalizer": 3.0}


def too_much(rules: Mapping[str, Any]) -> str | None:
    """What a tokenizer has too much of, in words that follow its name; None if it is within all limits."""
    for part in PARTS:
        node = rules.get(part)
        if part == "model" and isinstance(node, dict):
            node = {k: v for k, v in node.items() if k not in _VOCABULARY}
        if found := _size(node) or _added(node) or _words(node):
            return f"has too much in its {part}: {found}"
    for parts in (_ENCODE, _DECODE):
        if growth(rules, parts) > _GROWTH:
            largest = max(parts, key=lambda part: growth(rules, (part,)))
            return f"has too much in its {largest}: with it, a text becomes more than {_GROWTH} times as long"
    return None


def growth(rules: Mapping[str, Any], parts: Sequence[str] = (*_ENCODE, *_DECODE)) -> float:
    """How many times as long ``parts`` of the rules, one after the other, can make a text, at most."""
    others, replaced = 1.0, _Replaced()
    for part in parts:
        for rule in _rules(rules.get(part)):
            others *= _own_growth(rule, part)
            if isinstance(rule.get("pattern"), dict) and rule["pattern"]:
                kind, pattern = next(iter(rule["pattern"].items()))
                replaced.add(kind, pattern, rule.get("content"))
            if others * replaced.growth > _GROWTH:  # before it is too large for a float
                break
    return others * replaced.growth


def _own_growth(rule: Mapping[str, Any], part: str) -> float:
    kind, table, found = rule.get("type"), rule.get("precompiled_charsmap"), 1.0
    if part in ("normalizer", "pre_tokenizer") and isinstance(kind, str):
        found *= _OF_TYPE.get(kind, 1)
    if isinstance(table, str):
        found *= _longest_in_table(table)
    for template in (rule.get("single"), rule.get("pair")):
        found *= max(1, *(_uses(template, "Sequence", text) for text in "AB"))
    return found


class _Replaced:
    """Replacements in their order: one multiplies another only if it finds a letter of what that one wrote."""

    def __init__(self) -> None:
        self.growth = 1.0
        self._of_letter: dict[str, float] = {}

    def add(self, kind: str, pattern: Any, content: Any) -> None:
        pattern, content = str(pattern), content if isinstance(content, str) else ""
        exact = kind == "String" and bool(pattern)
        own = max(1.0, len(content) / len(pattern)) if exact else len(content) + 1.0
        before = max((self._of_letter.get(c, 1.0) for c in pattern), default=1.0) if exact else self.growth
        for letter in content:
            self._of_letter[letter] = max(self._of_letter.get(letter, 1.0), own * before)
        self.growth = max(self.growth, own * before)


def _size(node: Any) -> str | None:
    """Which limit of size is passed; counted without recursion, and no further than to the limit."""
    stack: list[tuple[str, Any]] = [("", node)]
    count = 0
    while stack:
        key, value = stack.pop()
        count += 1
        inner = len(value) if isinstance(value, (dict, list)) else 0
        if count + len(stack) + inner > _VALUES:
            return f"more than {_VALUES:,} values"
        if isinstance(value, dict):
            stack += value.items()
        elif isinstance(value, list):
            stack += [(key, one) for one in value]
        most = _TABLE if key == "precompiled_charsmap" else _CHARACTERS
        if (longest := max(len(value) if isinstance(value, str) else 0, len(key))) > most:
            return f"a text of {longest:,} characters, where {most:,} are the most"
    return None


def _words(node: Any) -> str | None:
    """A vocabulary of pieces is searched for each part of a word: in the cube of its length."""
    letters = node.get("max_input_chars_per_word") if isinstance(node, dict) else None
    if isinstance(letters, (int, float)) and letters > _LETTERS:
        return f"words of up to {letters:,} letters, where {_LETTERS:,} are the most"
    return None


def _added(node: Any) -> str | None:
    texts = (rule.get(name) for rule in _rules(node) for name in ("prepend", "append"))
    added = sum(len(text) for text in texts if isinstance(text, str))
    if added > _ADDED:
        return f"it adds {added:,} characters to a text, where {_ADDED} are the most"
    tokens = sum(_template_tokens(rule) for rule in _rules(node))
    if tokens > _ADDED:
        return f"it adds {tokens:,} tokens to a text, where {_ADDED} are the most"
    return None


def _template_tokens(rule: Mapping[str, Any]) -> int:
    """The tokens that a template adds to a text, or to a pair."""
    known = rule.get("special_tokens")
    if not isinstance(known, dict):
        return 0
    sizes = {
        name: len(t["ids"])
        for name, t in known.items()
        if isinstance(t, dict) and isinstance(t.get("ids"), list)
    }
    return max(
        sum(_uses(rule.get(kind), "SpecialToken", name) * size for name, size in sizes.items() if size)
        for kind in ("single", "pair")
    )


def _uses(template: Any, kind: str, name: str) -> int:
    pieces = template if isinstance(template, list) else []
    return sum(
        isinstance(p, dict) and isinstance(p.get(kind), dict) and p[kind].get("id") == name for p in pieces
    )


def _longest_in_table(table: str) -> float:
    """Characters of the longest text that a table of SentencePiece puts for a letter.

    The table is the size of a trie, the trie, and the texts, each with a zero byte at its end.
    """
    try:
        raw = base64.b64decode(table)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return float(max(1, *(len(t.decode("utf-8", "replace")) for t in texts.split(b"\0"))))


def _rules(node: Any) -> Iterator[dict[str, Any]]:
    """Every object within ``node``, in the order of the file."""
    stack = [node]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack += reversed([v for v in value.values() if isinstance(v, (dict, list))])
        elif isinstance(value, list):
            stack += reversed(value)
