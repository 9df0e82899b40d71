"""Packing with a disjoint held-out part, start tokens, and what is kept on disk."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.passages import frame_of
from nbl_export.calibrate.text import (
    CalibrationText,
    check_tokens,
    load_text,
    pack,
    save_text,
    start_tokens,
    token_ids,
)
from nbl_export.errors import InputError
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from nbl_export.tensorfile import save_tensors
from tests.listening import Notes

# packing -----------------------------------------------------------------------------------------


def marked(count: int, words: int = 12) -> list[str]:
    """Documents each made of its own word only."""
    return [f"doc{i:03d} " * words for i in range(count)]


def words(tokenizer: Any, tokens: np.ndarray) -> set[str]:
    """The whole marker words in ``tokens``."""
    return set(re.findall(r"doc\d{3}", tokenizer.decode(tokens.reshape(-1).tolist())))


def test_packing_joins_documents_with_the_end_token(tokenizer: Any) -> None:
    texts = marked(64)
    settings = CalibrateSettings(samples=20, seq_len=32, heldout_samples=6, selection_samples=5)
    listener = Notes()
    text = pack(texts, tokenizer, settings, listener)
    assert text.calibration.shape == (20, 32)
    assert text.selection.shape == text.selection_document.shape == (5, 32)
    assert text.heldout.shape == text.heldout_document.shape == (6, 32)
    assert all(
        getattr(text, name).dtype == np.int32 for name in CalibrationText.__annotations__ if name != "media"
    )
    assert listener.notes == []
    assert listener.start[0] == sum(listener.advanced) == 31 * 32
    # A byte-level tokenizer gives one token a character; 257 is its end of text. Of every eight documents, six
    # are calibrated on, the fourth is for choosing and the eighth for judging.
    for tokens, kept in (
        (text.calibration, {0, 1, 2, 4, 5, 6}),
        (text.selection, {3}),
        (text.heldout, {7}),
    ):
        flat = [c for i, t in enumerate(texts) if i % 8 in kept for c in (*t, None)][: tokens.size]
        ids = tokens.reshape(-1).tolist()
        assert [None if i == 257 else tokenizer.decode([i]) for i in ids] == flat


def test_a_document_is_in_one_part_only(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=30, seq_len=32, heldout_samples=8, selection_samples=8)
    text = pack(marked(64), tokenizer, settings, Silent())
    parts = [words(tokenizer, t) for t in (text.calibration, text.selection, text.heldout)]
    seen, chosen_by, held = parts
    assert len(seen) > 8 and len(chosen_by) > 2 and len(held) > 2
    assert sum(map(len, parts)) == len(seen | chosen_by | held)
    assert {int(w[3:]) % 8 for w in chosen_by} == {3}
    assert {int(w[3:]) % 8 for w in held} == {7}


@pytest.mark.parametrize("part", ["selection", "heldout"])
def test_every_token_that_is_judged_knows_its_document(tokenizer: Any, part: str) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=12, selection_samples=12)
    text = pack(marked(64), tokenizer, settings, Silent())
    owners, tokens = (getattr(text, name).reshape(-1) for name in (f"{part}_document", part))
    assert np.all(np.diff(owners) >= 0)
    assert len(set(owners.tolist())) > 3
    for owner in set(owners.tolist()):
        piece = tokens[owners == owner].tolist()
        assert tokenizer.decode(piece).removesuffix("</s>") == (f"doc{owner:03d} " * 12)[: len(piece)]


def test_blank_documents_count_for_nothing(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=4)
    with_blanks = [t for text in marked(40) for t in ("", text, " \n\t")]
    one, other = (pack(t, tokenizer, settings, Silent()) for t in (marked(40), with_blanks))
    for name in CalibrationText.__annotations__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_packing_stops_reading_when_it_is_full(tokenizer: Any) -> None:
    def stream() -> Iterator[str]:
        yield from marked(40)
        pytest.fail("read on although all parts were full")

    pack(
        stream(),
        tokenizer,
        CalibrateSettings(samples=4, seq_len=32, heldout_samples=4, selection_samples=4),
        Silent(),
    )


def test_a_short_text_is_used_as_far_as_it_goes_with_a_note(tokenizer: Any) -> None:
    # 12 documents of 84 characters and an end token for calibration, 2 for choosing, 2 held out.
    listener = Notes()
    settings = CalibrateSettings(samples=100, seq_len=32, heldout_samples=100, selection_samples=100)
    text = pack(marked(16), tokenizer, settings, listener)
    assert text.calibration.shape == (12 * 85 // 32, 32)
    assert text.selection.shape == text.heldout.shape == (2 * 85 // 32, 32)
    assert listener.notes == [
        "The text gives 1,020 calibration tokens of the 3,200 asked for; all are used.",
        "The text gives 170 selection tokens of the 3,200 asked for; all are used.",
        "The text gives 170 held-out tokens of the 3,200 asked for; all are used.",
    ]


@pytest.mark.parametrize(
    ("count", "part"),
    [(0, "0 calibration"), (3, "0 selection"), (4, "85 selection"), (12, "85 held-out")],
)
def test_too_little_text_is_refused(tokenizer: Any, count: int, part: str) -> None:
    settings = CalibrateSettings(samples=1, seq_len=128, heldout_samples=1, selection_samples=1)
    with pytest.raises(InputError) as caught:
        pack(marked(count), tokenizer, settings, Silent())
    message = str(caught.value)
    assert f"gives {part} tokens, less than one row of 128" in message
    assert "give more text" in message
    assert "--seq-len" in message


def test_an_empty_file_is_too_little_text(tmp_path: Path, tokenizer: Any) -> None:
    for name, content in (("a.txt", b""), ("b.jsonl", b"\n"), ("c.txt.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="gives 0 calibration tokens"):
            pack(documents([str(tmp_path / name)], "text"), tokenizer, CalibrateSettings(), Silent())


def test_packing_is_deterministic(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=5, seq_len=16, heldout_samples=2)
    one, other = (pack(marked(30), tokenizer, settings, Silent()) for _ in range(2))
    for name in CalibrationText.__annotations__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"samples": 0}, "--samples is 0; it must be at least 1"),
        ({"seq_len": 7}, "--seq-len is 7; it must be at least 8"),
        ({"selection_samples": 0}, "--selection-samples is 0; it must be at least 1"),
        ({"heldout_samples": -1}, "--heldout-samples is -1; it must be at least 1"),
        ({"sources": ("self", "a.txt")}, "--calibration self stands alone"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], option: str) -> None:
    CalibrateSettings().check()
    with pytest.raises(InputError, match=option):
        CalibrateSettings(**changes).check()


# start tokens ------------------------------------------------------------------------------------


def with_template(folder: Path, single: str) -> Any:
    tokenizer = load_tokenizer(find_model(str(folder)))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


def test_start_tokens_fall_back_on_the_beginning_of_text(tokenizer: Any) -> None:
    start = start_tokens(tokenizer)
    assert start.dtype == np.int32
    assert start.tolist() == [256]


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("<s> $A", [256]),
        ("</s> <s> $A", [257, 256]),
        ("$A </s>", [256]),
        ("<s> $A </s>", [256]),
    ],
)
def test_start_tokens_follow_the_tokenizers_own_rules(
    tiny_folder: Path, template: str, start: list[int]
) -> None:
    assert start_tokens(with_template(tiny_folder, template)).tolist() == start


@pytest.mark.parametrize("token", [2**31, 2**32 - 1])
def test_a_token_that_no_model_has_is_named(tiny_folder: Path, token: int) -> None:
    said = f"gives the token {token:,}, which no model has an embedding of: use the tokenizer"
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="q $A", special_tokens=[("q", token)]
    )
    for read in (start_tokens, frame_of):
        with pytest.raises(InputError, match=said):
            read(tokenizer)
    asked = CalibrateSettings(("x",), samples=1, seq_len=8, heldout_samples=1, selection_samples=1)
    with pytest.raises(InputError, match=said):
        pack(["a text " * 20] * 8, Counting(token), asked, Silent())


def test_a_tokenizer_without_special_tokens_starts_with_nothing(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    tokenizer.bos_token = None
    start = start_tokens(tokenizer)
    assert start.dtype == np.int32
    assert start.shape == (0,)


# on disk -----------------------------------------------------------------------------------------


def test_packed_text_comes_back(tmp_path: Path, tokenizer: Any) -> None:
    text = pack(marked(30), tokenizer, CalibrateSettings(samples=5, seq_len=16, heldout_samples=2), Silent())
    path = tmp_path / "text.safetensors"
    save_text(path, text)
    loaded = load_text(path)
    assert loaded.media is None
    for name in CalibrationText.__annotations__.keys() - {"media"}:
        assert getattr(loaded, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(loaded, name), getattr(text, name))
    raw = path.read_bytes()
    assert b"nbl-export/text/2" in raw
    flipped = raw[:-1] + bytes([raw[-1] ^ 1])
    for content in (raw[:-1], raw[:10], b"", b"no safetensors", flipped):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"text\.safetensors .*: run `nbl-export calibrate` again\.$"):
            load_text(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_text(path)


def test_text_without_a_part_for_choosing_is_of_an_earlier_format(tmp_path: Path, tokenizer: Any) -> None:
    text = pack(marked(30), tokenizer, CalibrateSettings(samples=5, seq_len=16, heldout_samples=2), Silent())
    path = tmp_path / "text.safetensors"
    earlier = {name: getattr(text, name) for name in ("calibration", "heldout", "heldout_document", "start")}
    for written, stored in (("nbl-export/text/1", earlier), ("nbl-export/text/2", earlier)):
        save_tensors(path, written, stored)
        with pytest.raises(InputError, match=r"text\.safetensors .*: run `nbl-export calibrate` again\.$"):
            load_text(path)


# limits ------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that keeps the length of the longest text it was given."""

    eos_token_id, pad_token_id, bos_token_id = 2, None, 1

    def __init__(self, token: int = 5) -> None:
        self.longest, self.token = 0, token

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.longest = max(self.longest, len(text))
        return {"input_ids": [self.token] * (len(text) // 4)}


def test_of_a_long_document_only_what_is_needed_is_tokenized() -> None:
    asked = CalibrateSettings(("x",), samples=6, seq_len=8, heldout_samples=1, selection_samples=1)
    counting = Counting()
    packed = pack(["ab " * 3_000_000] * 8, counting, asked, Silent())
    assert packed.calibration.shape == (6, 8)
    assert counting.longest == 6 * 8 * 16


@pytest.mark.parametrize("token", [-1, 12])
def test_a_token_beyond_the_embedding_is_named(token: int) -> None:
    asked = CalibrateSettings(("x",), samples=1, seq_len=8, heldout_samples=1, selection_samples=1)
    packed = pack(["a text " * 20] * 8, Counting(token), asked, Silent())
    with pytest.raises(InputError, match=f"gives the token {token}, the model has embeddings of 12 tokens"):
        check_tokens(packed, 12, "m")
    assert check_tokens(packed, 13, "m") is packed if token > 0 else True


def test_a_tokenizer_that_fails_is_one_sentence() -> None:
    class Panic(BaseException):
        pass

    def fails(*_: Any, **__: Any) -> Any:
        raise Panic("Regex search error\nmore")

    with pytest.raises(
        InputError, match="The tokenizer fails on the text that begins with 'abc': Regex search"
    ):
        token_ids(fails, "abc", 5)
