"""Tokenizers as fields; that llama.cpp makes the same tokens is shown in tests/runtime/test_forms.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nbl_export.convert.gguf_tokenizer import fields_of, fields_of_gguf
from nbl_export.errors import InputError


def test_a_tokenizer_of_pieces_has_scores_in_the_order_of_its_merges(stories_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(stories_folder)
    fields = {key: value for key, value, _, _ in fields_of(tokenizer, 520).fields}
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"] is False
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert len(tokens) == len(scores) == len(types) == 520
    assert tokens[512:] == [f"[PAD{n}]" for n in range(512, 520)] and set(types[512:]) == {5}
    assert tokens[3:259] == [f"<0x{n:02X}>" for n in range(256)] and set(types[3:259]) == {6}
    assert types[:3] == [2, 3, 3]
    # The earlier a token is merged, the higher is its score.
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
    order = sorted(set(made), key=made.index)
    assert order == sorted(order, key=lambda token: -scores[tokens.index(token)]) and len(order) > 100


def byte_level(*splits: Any, **said: Any) -> Any:
    made = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", **said)


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(("splits", "name"), [([GPT_2], "gpt-2"), ([DIGITS, GPT_2], "smollm")])
def test_byte_level_tokenizers_are_named_by_how_they_split(splits: list[Any], name: str) -> None:
    tokenizer = byte_level(*splits, chat_template="{{ messages }}")
    fields = {key: value for key, value, _, _ in fields_of(tokenizer, 4).fields}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.merges"] == ["a b"] and fields["tokenizer.ggml.bos_token_id"] == 3
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.token_type"][3] == 3
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_what_llama_cpp_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="splits a text by rules that --to gguf does not know"):
        fields_of(byte_level(pre_tokenizers.Punctuation(), GPT_2), 4)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )
    with pytest.raises(InputError, match="no tokenizer of the kind WordPiece"):
        fields_of(words, 2)


def test_the_tokenizer_of_a_gguf_file_stays_as_it_is(smollm2: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    fields = fields_of_gguf(smollm2)
    writer = GGUFWriter(tmp_path / "copy.gguf", "llama")
    fields.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before, after = (GGUFReader(path).fields for path in (smollm2, tmp_path / "copy.gguf"))
    own = [name for name in before if name.startswith("tokenizer.")]
    assert len(own) >= 5 and own == [name for name in after if name.startswith("tokenizer.")]
    assert all(before[name].contents() == after[name].contents() for name in own)
