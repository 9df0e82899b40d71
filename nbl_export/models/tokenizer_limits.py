"""A tokenizer is looked at, and tried in a child process, before it is used: its rules are somebody else's program.

Thirty replacements of "a" by "aa" make 10⁹ letters of one: what the rules say of their own growth is held to limits
(:mod:`.tokenizer_growth`). A regular expression can take minutes for a line, which no look at it says: the tokenizer is
tried within limits of time and memory. One without regular expressions, with few rules that grow little, is not tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export.child_process import ChildError, in_child
from nbl_export.errors import InputError
from nbl_export.files import member, read_json
from nbl_export.models.tokenizer_growth import growth, too_much

TOKENIZER = "tokenizer.json"
_CONFIG, _VERSIONS = "tokenizer_config.json", "fast_tokenizer_files"
_SPECIAL = "special_tokens_map.json"
_PATIENCE = 20  # seconds
_VOCABULARIES = (TOKENIZER, "*vocab*", "*merges*", "*.model", "*.tiktoken", "*.bpe", "tekken.json")
_PROBE = 8192  # characters of each text that is tried
_GROWTH, _RULES = 16, 64  # how often a text may grow, and how many rules there may be, without a trial
_LONGEST = 200_000  # tokens that the probes may become, each
_LETTERS = ("a", "ab", " ", "1", "é", "a b1, ", "\n", "x" * 30 + "!")


def has_vocabulary(folder: Path) -> bool:
    """Whether a model folder has a file that a tokenizer reads its vocabulary from, by the names that are used."""
    return any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES)


def check_tokenizer(source: str, folder: Path) -> None:
    """Refuse a ``tokenizer.json`` of a model folder that cannot tokenize short texts in little time and memory."""
    versions = [folder / TOKENIZER, *_versions(folder)]
    for path in [*versions, folder / _CONFIG, folder / _SPECIAL]:
        if path.is_file():
            _check_tokens(path)
    for path in versions:
        if path.is_file():
            _check_rules(source, path)


def _check_tokens(path: Path) -> None:
    """Refuse a special token with an option whose name is none: the library prints such a name as it stands."""
    stack = [read_json(path, path.name, "download the model again")]
    while stack:
        node = stack.pop()
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        stack.extend(part for part in parts if isinstance(part, (dict, list)))
        bad = (
            [name for name in node if not name.isidentifier()]
            if isinstance(node, dict) and "content" in node
            else []
        )
        if bad and not _is_vocabulary(node):
            raise InputError(
                f"{path} has a token with the option {bad[0]!r:.100}: use the model's original {path.name}."
            )


def _is_vocabulary(node: dict[str, Any]) -> bool:
    """Whether ``node`` has a number for each text: that "content" is one of them says nothing."""
    return all(isinstance(value, (int, float)) for value in node.values())


def _versions(folder: Path) -> list[Path]:
    """The files that a folder offers in place of its ``tokenizer.json`` to later releases of transformers."""
    path = folder / _CONFIG
    config = read_json(path, _CONFIG, "download the model again") if path.is_file() else None
    named = config.get(_VERSIONS) if isinstance(config, dict) else None
    if named is None:
        return []
    what = f"A file in {_VERSIONS}"
    found = [member(folder, name, what) for name in named] if isinstance(named, list) else None
    if found is None or any(version.parent != folder for version in found):
        raise InputError(f"{path} has {_VERSIONS} that are no names of files beside it: remove that key.")
    return found


def _check_rules(source: str, path: Path) -> None:
    rules = read_json(path, "The tokenizer", "download the model again")
    if not isinstance(rules, dict):
        raise InputError(f"{path} is not a tokenizer: download the model again.")
    if found := too_much(rules):
        raise InputError(f"The tokenizer of {source} {found}; use the model's original tokenizer.json.")
    parts = [rules.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    patterns, count = list(_patterns(parts)), str(parts).count("'type'")
    few = count <= _RULES and growth(rules) < _GROWTH
    if few and not any(kind == "Regex" for kind, _ in patterns):
        return
    probes = [*_LETTERS, *(text for _, text in patterns if text)][:64]
    try:
        in_child(
            _tokenize,
            {"path": str(path), "probes": [(p * _PROBE)[:_PROBE] for p in probes]},
            f"The tokenizer of {source}",
            "its rules cannot be used; use the model's original tokenizer.json",
            _PATIENCE,
        )
    except ChildError as error:
        raise InputError(str(error)) from None


def _patterns(rules: Any) -> Iterator[tuple[str, str]]:
    """(kind, text) of every pattern in the rules."""
    stack = [rules]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            pattern = node.get("pattern")
            if isinstance(pattern, dict) and pattern:
                kind, text = next(iter(pattern.items()))
                yield str(kind), str(text)
            stack.extend(v for v in node.values() if isinstance(v, (dict, list)))


def _tokenize(asked: Any, _tell: Any) -> None:
    """In the child."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(asked["path"])
    tokenizer.no_padding()  # as transformers uses it
    tokenizer.no_truncation()
    for probe in asked["probes"]:
        ids = tokenizer.encode(probe, add_special_tokens=False).ids
        count = len(ids)
        if count > _LONGEST:
            raise InputError(
                f"The tokenizer at {asked['path']} makes {count:,} tokens of {len(probe):,} characters: use the "
                "model's original tokenizer.json."
            )
        tokenizer.decode(ids)
