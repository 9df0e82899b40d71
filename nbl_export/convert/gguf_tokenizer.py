"""A tokenizer as the fields of a GGUF file: those of the file that the model comes from, or made of tokenizer.json.

Whether llama.cpp then makes the same tokens is not assumed: :mod:`nbl_export.verify.converted` compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.files import read_table

_PREFIX = "tokenizer."
# Types of tokens, as gguf.TokenType has them.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"


@dataclass(frozen=True)
class TokenizerFields:
    """Fields of a GGUF file, each a key, a value and its type (and that of its elements)."""

    fields: tuple[tuple[str, Any, Any, Any], ...]

    def write(self, writer: Any) -> None:
        """Add all fields to a ``gguf.GGUFWriter``."""
        for key, value, kind, element in self.fields:
            writer.add_key_value(key, value, kind, sub_type=element)


def fields_of_gguf(path: Path) -> TokenizerFields:
    """The tokenizer of the GGUF file ``path``, as it is."""
    from gguf import GGUFReader, GGUFValueType

    found = []
    for field in GGUFReader(path).fields.values():
        if field.name.startswith(_PREFIX):
            array = field.types[0] == GGUFValueType.ARRAY
            found.append((field.name, field.contents(), field.types[0], field.types[-1] if array else None))
    if not found:
        raise InputError(f"{path} has no tokenizer.")
    return TokenizerFields(tuple(found))


def fields_of(tokenizer: Any, vocabulary: int) -> TokenizerFields:
    """The fields of a fast ``tokenizer`` of transformers, for a model with that many rows of embeddings.

    Raises :class:`InputError` for one that llama.cpp does not have.
    """
    from gguf import GGUFValueType as Kind

    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model.get("type") != "BPE":
        raise InputError(
            f"llama.cpp has no tokenizer of the kind {model.get('type')}: --to gguf takes byte-pair encodings."
        )
    tokens, types = _tokens(said, vocabulary)
    own: list[tuple[str, Any, Any, Any]]
    if model.get("byte_fallback"):
        own = [
            ("ggml.model", "llama", Kind.STRING, None),
            ("ggml.scores", _scores(model, tokens, types), Kind.ARRAY, Kind.FLOAT32),
            ("ggml.add_space_prefix", _adds_space(said), Kind.BOOL, None),
        ]
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        own = [
            ("ggml.model", "gpt2", Kind.STRING, None),
            ("ggml.pre", _pre_tokenizer(said), Kind.STRING, None),
            ("ggml.merges", merges, Kind.ARRAY, Kind.STRING),
        ]
    own += [
        ("ggml.tokens", tokens, Kind.ARRAY, Kind.STRING),
        ("ggml.token_type", types, Kind.ARRAY, Kind.INT32),
    ]
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            key = "unknown" if name == "unk" else "padding" if name == "pad" else name
            own.append((f"ggml.{key}_token_id", int(number), Kind.UINT32, None))
    ids = tokenizer("a").input_ids
    own.append(("ggml.add_bos_token", ids[0] == tokenizer.bos_token_id, Kind.BOOL, None))
    own.append(("ggml.add_eos_token", ids[-1] == tokenizer.eos_token_id, Kind.BOOL, None))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        own.append(("chat_template", template, Kind.STRING, None))
    return TokenizerFields(
        tuple((f"{_PREFIX}{key}", value, kind, element) for key, value, kind, element in own)
    )


def _tokens(said: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its type; rows of the embedding without a token are unused."""
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    fallback = bool(said["model"].get("byte_fallback"))
    for text, number in said["model"]["vocab"].items():
        byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[number], types[number] = text, _BYTE if byte else _NORMAL
    unknown = said["model"].get("unk_token")
    for added in said["added_tokens"]:
        number = added["id"]
        tokens[number] = added["content"]
        types[number] = _CONTROL if added["special"] else _USER
        if added["content"] == unknown:
            types[number] = _UNKNOWN
    return tokens, types


def _scores(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Of each token, how early it is merged: llama.cpp merges the pair whose token has the highest score."""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    last = len(merges)
    return [
        -float(rank.get(token, last)) if kind == _NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _adds_space(said: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    return any(
        one.get("prepend") == _SPACE or one.get("prepend_scheme") in ("first", "always")
        for one in _parts(said, "normalizer", "pre_tokenizer")
    )


def _parts(said: Mapping[str, Any], *names: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a tokenizer's normalizer and the like, those of a sequence one by one."""
    for name in names:
        step = said.get(name) or {}
        yield from step.get("normalizers") or step.get("pretokenizers") or ([step] if step else [])


def _pre_tokenizer(said: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rules by which a text is split."""
    splits = []
    for part in _parts(said, "pre_tokenizer"):
        if part["type"] == "Split":
            splits.append(part["pattern"].get("Regex", ""))
        elif part["type"] == "Digits" and part.get("individual_digits"):
            splits.append("digits")
        elif part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            splits += ["gpt-2"] if part.get("use_regex") else []
        else:
            splits.append(part["type"])
    for name, known in read_table(Path(__file__).parent / "pre_tokenizers.toml").items():
        if known["splits"] == splits:
            return name
    raise InputError(
        "This tokenizer splits a text by rules that --to gguf does not know "
        f"({'; '.join(splits)[:200] or 'none'}): convert from a GGUF file of the model, which names them."
    )
