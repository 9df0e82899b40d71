"""Packing with a disjoint held-out part, images that are never cut, special tokens, and what is kept on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from nbl_export.batch.media_ids import FIRST, are_media, words
from nbl_export.calibrate.text import (
    PADDING,
    CalibrationText,
    Document,
    check_tokens,
    frame_of,
    heldout_rows,
    load_text,
    longest_row,
    pack,
    read_passages,
    save_text,
    start_tokens,
    token_ids,
)
from nbl_export.errors import InputError
from nbl_export.models.load import load_tokenizer
from nbl_export.models.media_tokens import MediaTokens
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from tests.listening import Notes


def marked(count: int, words: int = 12) -> list[str]:
    """Documents each made of its own word only."""
    return [f"doc{i:03d} " * words for i in range(count)]


def test_packing_joins_documents_with_the_end_token(tokenizer: Any) -> None:
    texts = marked(64)
    settings = CalibrateSettings(samples=20, seq_len=32, heldout_samples=6, selection_samples=5)
    listener = Notes()
    text = pack([*texts[:3], " ", *texts[3:]], tokenizer, settings, listener)
    assert text.calibration.shape == (20, 32)
    assert text.selection.shape == text.selection_document.shape == (5, 32)
    assert text.heldout.shape == text.heldout_document.shape == (6, 32)
    assert text.calibration.dtype == text.heldout_document.dtype == np.int32 and text.media is None
    assert listener.notes == [] and listener.start[0] == sum(listener.advanced) == 31 * 32
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
    # Each token knows its document.
    for tokens, owners in ((text.selection, text.selection_document), (text.heldout, text.heldout_document)):
        for number in np.unique(owners):
            inside = tokenizer.decode([t for t in tokens[owners == number] if t != 257])
            assert set(re.findall(r"doc(\d{3})", inside)) <= {f"{number:03d}"}


def test_too_little_text(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=100, seq_len=32, heldout_samples=2, selection_samples=2)
    notes = Notes()
    text = pack(marked(16), tokenizer, settings, notes)
    assert 1 <= len(text.calibration) < 100
    have = 12 * (7 * 12 + 1)
    assert notes.notes == [
        f"The text gives {have:,} calibration tokens of the 3,200 asked for; all are used."
    ]
    with pytest.raises(InputError, match="gives 0 held-out tokens, less than one row of 32: give more text"):
        pack(marked(7), tokenizer, settings, Silent())


def test_only_as_much_of_a_long_document_is_tokenized_as_is_needed(tokenizer: Any) -> None:
    assert len(token_ids(tokenizer, "abc " * 1000, 10)) == 160

    def fails(*_args: Any, **_more: Any) -> Any:
        raise RuntimeError("odd bytes\nand more")

    with pytest.raises(
        InputError, match=r"The tokenizer fails on the text that begins with 'abc': odd bytes"
    ):
        token_ids(fails, "abc", 10)


def test_tokens_that_the_model_has_no_embedding_of(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=1, selection_samples=1)
    text = pack(marked(16), tokenizer, settings, Silent())
    assert check_tokens(text, 258, "tiny") is text
    with pytest.raises(
        InputError, match=r"tokenizer of tiny gives the token 257, the model has .* 257 tokens"
    ):
        check_tokens(text, 257, "tiny")


def test_start_tokens_are_the_tokenizers_own(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    bos = tokenizer.bos_token_id
    assert start_tokens(tokenizer).tolist() == ([] if bos is None else [bos])
    framed = processors.TemplateProcessing(single="X $A Y", special_tokens=[("X", 250), ("Y", 251)])
    tokenizer.backend_tokenizer.post_processor = framed
    assert start_tokens(tokenizer).tolist() == [250]
    frame = frame_of(tokenizer)
    assert (frame.start.tolist(), frame.end.tolist(), frame.size) == ([250], [251], 2)


def test_text_comes_back_to_the_bit(tmp_path: Path, tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=1, selection_samples=1)
    text = pack(marked(16), tokenizer, settings, Silent())
    save_text(tmp_path / "text.safetensors", text)
    again = load_text(tmp_path / "text.safetensors")
    assert all(
        np.array_equal(getattr(again, n), getattr(text, n))
        for n in CalibrationText.__annotations__
        if n != "media"
    )


# images ------------------------------------------------------------------------------------------

SETTINGS = CalibrateSettings(samples=12, seq_len=32, heldout_samples=3, selection_samples=3)


class See:
    """Makes ``size`` tokens of each image, after a letter of its text each; what is known of them is their number."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0

    def __call__(self, document: Document) -> tuple[Any, MediaTokens]:
        text, images, ids = document.text, document.images, list[int]()
        for letter, _ in zip(text, images, strict=False):
            ids += [ord(letter), *range(FIRST + self.count, FIRST + self.count + self.size)]
            self.count += self.size
        ids += [ord(letter) for letter in text[len(images) :]]
        made = np.arange(self.count - self.size * len(images), self.count, dtype=np.int32)
        one = np.ones_like(made)
        known = MediaTokens(
            features=np.repeat(made[:, None], 3, 1).astype(np.float32),
            later=np.zeros((len(made), 0, 3), np.float32),
            offsets=made[:, None] * 0,
            steps=one,
            block=made // self.size,
            stand_in=one * 0,
            both_ways=np.zeros(1, np.int32),
        )
        return np.array(ids, dtype=np.int32), known


def packed(tokenizer: Any, size: int = 5) -> tuple[CalibrationText, list[str]]:
    found = [
        Document(text, (Path("a.png"),) * (i % 4), f"line {i + 1}") if i % 4 else text
        for i in range(80)
        for text in [chr(97 + i % 26) * (6 + i % 17)]
    ]
    listener = Notes()
    return pack(found, tokenizer, SETTINGS, listener, See(size)), listener.notes


def test_no_image_is_cut_and_its_tokens_are_of_no_document(tmp_path: Path, tokenizer: Any) -> None:
    text, notes = packed(tokenizer)
    assert text.media is not None
    splits = {"calibration": text.calibration, "selection": text.selection, "held-out": text.heldout}
    assert [len(rows) for rows in splits.values()] == [12, 3, 3]
    for rows in splits.values():
        for row in rows:
            _, counts = np.unique(text.media.block[row[are_media(row)] - FIRST], return_counts=True)
            assert (counts == 5).all()
    for kind in ("selection", "heldout"):
        assert ((getattr(text, f"{kind}_document") == -1) == are_media(getattr(text, kind))).all()
    owners = [set(np.unique(o[o >= 0]) % 8) for o in (text.selection_document, text.heldout_document)]
    assert owners == [{3}, {7}]
    (said,) = [note for note in notes if note.startswith("Images: ")]
    for name, rows in splits.items():
        tokens = int(are_media(rows).sum())
        assert tokens and f"{name} {tokens // 5} ({tokens} of {rows.size} tokens)" in said
    assert words(text.calibration).max() < 260
    save_text(tmp_path / "text.safetensors", text)
    again = load_text(tmp_path / "text.safetensors")
    assert again.media is not None and np.array_equal(again.media.features, text.media.features)


def test_an_image_longer_than_a_row_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"line 2: its first image ends beyond 32 tokens: raise --seq-len"):
        packed(tokenizer, size=40)


# encoders ----------------------------------------------------------------------------------------


def test_passages_are_framed(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    special = [("X", 250), ("Y", 251)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="X $A Y", special_tokens=special
    )
    settings = CalibrateSettings(samples=10, seq_len=32, heldout_samples=2)
    text = read_passages(["ab", *marked(40, 2), "x"], tokenizer, settings, 20, Silent())
    assert text.calibration.shape == (10, 20) and text.selection.shape == (0, 20)
    assert (text.calibration[:, 0] == 250).all() and (text.calibration[:, -1] == 251).all()
    rows = heldout_rows(text, ["token_type_ids"])
    assert len(rows) == 2 and all(row["input_ids"][0, [0, -1]].tolist() == [250, 251] for row in rows)
    assert all((row["token_type_ids"] == 0).all() for row in rows)
    assert ((text.heldout_document == PADDING) == (text.heldout == frame_of(tokenizer).pad)).all()
    # The eighth document, counted from the first.
    assert tokenizer.decode(rows[0]["input_ids"][0, 1:-1]) == "doc006 doc006 "
    with pytest.raises(InputError, match="less than one row of 20 and one document: give more text"):
        read_passages(marked(3), tokenizer, settings, 20, Silent())
    with pytest.raises(InputError, match=r"--seq-len 2 leaves no room for text next to 2 special tokens"):
        read_passages(marked(3), tokenizer, settings, 2, Silent())


def test_rows_are_no_longer_than_the_model_takes(tokenizer: Any) -> None:
    notes = Notes()
    assert longest_row(CalibrateSettings(seq_len=64), tokenizer, 16, notes) == 16
    assert notes.notes == ["Rows have 16 tokens instead of 64: the model takes no more."]
    assert longest_row(CalibrateSettings(seq_len=64), tokenizer, None, notes) == 64
