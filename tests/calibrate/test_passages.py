"""Rows for encoders: framed, packed without padding, one document held out a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nbl_export.calibrate.passages import PADDING, frame_of, heldout_rows, longest_row, read_passages
from nbl_export.errors import InputError
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from tests.encoders import CLS, PAD, SEP, save_tokenizer
from tests.listening import Notes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


DOCUMENTS = [f"document number {i:02}" for i in range(24)]  # every eighth is held out: 07, 15 and 23


def test_rows_hold_the_documents_in_order(tokenizer: Any) -> None:
    settings, notes = CalibrateSettings(("x",), samples=3, heldout_samples=2), Notes()
    text = read_passages(DOCUMENTS, tokenizer, settings, 32, notes)
    assert text.calibration.shape == (3, 32) and not notes.notes
    assert (text.calibration[:, 0] == CLS).all() and (text.calibration[:, -1] == SEP).all()
    packed = text.calibration[:, 1:-1].reshape(-1)
    expected: list[int] = []
    for i, document in enumerate(DOCUMENTS):
        if i % 8 != 7:
            expected += [*tokenizer(document, add_special_tokens=False)["input_ids"], SEP]
    np.testing.assert_array_equal(packed, expected[: len(packed)])
    for i, (row, owner) in enumerate(zip(text.heldout, text.heldout_document, strict=True)):
        own = tokenizer(DOCUMENTS[8 * i + 7])["input_ids"]
        np.testing.assert_array_equal(row[: len(own)], own)
        assert (owner[: len(own)] == i).all() and (owner[len(own) :] == PADDING).all()
        assert (row[len(own) :] == PAD).all()


def test_a_long_document_keeps_its_end_token(tokenizer: Any) -> None:
    settings = CalibrateSettings(("x",), samples=1, heldout_samples=1)
    text = read_passages(["word " * 40] * 8, tokenizer, settings, 16, Silent())
    assert text.heldout.shape == (1, 16) and (text.heldout[0, 0], text.heldout[0, -1]) == (CLS, SEP)
    (row,) = heldout_rows(text, ["input_ids", "token_type_ids"])
    assert row["input_ids"].shape == row["token_type_ids"].shape == (1, 16)
    assert not row["token_type_ids"].any()


def test_too_little_text(tokenizer: Any) -> None:
    settings = CalibrateSettings(("x",), samples=1, heldout_samples=1)
    with pytest.raises(
        InputError, match=r"and 0 held-out documents, less than one row of 16 and one document"
    ):
        read_passages(DOCUMENTS[:7], tokenizer, settings, 16, Silent())
    with pytest.raises(InputError, match="leaves no room for text next to 2 special tokens"):
        read_passages(DOCUMENTS, tokenizer, settings, 2, Silent())
    notes = Notes()
    read_passages(DOCUMENTS, tokenizer, CalibrateSettings(("x",), samples=99, heldout_samples=9), 16, notes)
    assert len(notes.notes) == 1 and "all are used" in notes.notes[0]


def test_the_frame_is_the_tokenizer_s_own(tokenizer: Any) -> None:
    frame = frame_of(tokenizer)
    assert (frame.start.tolist(), frame.end.tolist(), frame.pad, frame.left) == ([CLS], [SEP], PAD, False)


@pytest.mark.parametrize(("positions", "expected"), [(None, 96), (40, 40), (400, 96)])
def test_rows_are_as_long_as_model_and_tokenizer_allow(
    tokenizer: Any, positions: int | None, expected: int, tmp_path: Path
) -> None:
    notes = Notes()
    assert longest_row(CalibrateSettings(("x",), seq_len=512), tokenizer, positions, notes) == expected
    assert len(notes.notes) == 1
    assert longest_row(CalibrateSettings(("x",), seq_len=24), tokenizer, positions, notes) == 24
