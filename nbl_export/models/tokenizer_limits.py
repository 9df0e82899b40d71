"""A tokenizer is tried in a child process before it is used: its rules are a program that somebody else wrote.

Thirty replacements of "a" by "aa" make 10⁹ letters of one, and a regular expression can take minutes for a line. Such a
tokenizer is refused by a limit of time and memory. A tokenizer that cannot do either, one without regular expressions
or replacements that grow, is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export.child_process import ChildError, Limits, in_child
from nbl_export.errors import InputError
from nbl_export.files import read_json

TOKENIZER = "tokenizer.json"
_LIMITS = Limits(seconds=20, memory=4 << 30)
_PROBE = 8192  # characters of each text that is tried
_GROWTH = 16  # times that a text may grow without being tried
_LONGEST = 200_000  # tokens that the probes may become, each
_LETTERS = ("a", "ab", " ", "1", "é", "a b1, ", "\n", "x" * 30 + "!")


def check_tokenizer(source: str, folder: Path) -> None:
    """Refuse the ``tokenizer.json`` of a model folder if it cannot tokenize short texts in little time and memory."""
    path = folder / TOKENIZER
    if not path.is_file():
        return
    rules = read_json(path, "The tokenizer", "download the model again")
    if not isinstance(rules, dict):
        raise InputError(f"{path} is not a tokenizer: download the model again.")
    patterns = list(_patterns([rules.get("normalizer"), rules.get("pre_tokenizer")]))
    growth = sum(math.log(grown) for _, _, grown in patterns if grown > 1)
    if growth < math.log(_GROWTH) and not any(kind == "Regex" for kind, _, _ in patterns):
        return
    probes = [*_LETTERS, *(text for _, text, _ in patterns if text)][:64]
    try:
        in_child(
            _tokenize,
            {"path": str(path), "probes": [(p * _PROBE)[:_PROBE] for p in probes]},
            f"The tokenizer of {source}",
            "its rules cannot be used; use the model's original tokenizer.json",
            _LIMITS,
        )
    except ChildError as error:
        raise InputError(str(error)) from None


def _patterns(rules: Any) -> Iterator[tuple[str, str, float]]:
    """(kind, text, how many times as long its replacement is) of every pattern in the rules."""
    stack = [rules]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            pattern, content = node.get("pattern"), node.get("content")
            if isinstance(pattern, dict) and pattern:
                kind, text = next(iter(pattern.items()))
                yield str(kind), str(text), len(str(content or "")) / max(1, len(str(text)))
            stack.extend(v for v in node.values() if isinstance(v, (dict, list)))


def _tokenize(asked: Any, _tell: Any) -> None:
    """In the child."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(asked["path"])
    for probe in asked["probes"]:
        count = len(tokenizer.encode(probe, add_special_tokens=False).ids)
        if count > _LONGEST:
            raise InputError(
                f"The tokenizer at {asked['path']} makes {count:,} tokens of {len(probe):,} characters: use the "
                "model's original tokenizer.json."
            )
