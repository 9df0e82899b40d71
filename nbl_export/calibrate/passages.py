"""Text for encoders: rows with the special tokens of the tokenizer, such as [CLS] … [SEP].

Calibration rows are packed: documents are joined by the end tokens and cut, and special tokens are added to each
row. A held-out row is one document with special tokens and padding, since an encoder computes one vector of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import TOKEN_TYPES, TOKENS
from nbl_export.calibrate.text import HELD_OUT_EVERY, CalibrationText, as_tokens, frame_tokens, token_ids
from nbl_export.errors import InputError
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings

I32 = NDArray[np.int32]
PADDING = -1  # the value of heldout_document at padding positions
_SHORTEST = 8  # the minimum number of tokens of a held-out document


@dataclass(frozen=True)
class Frame:
    """The special tokens around a text, and the padding of a batch."""

    start: I32
    end: I32
    pad: int
    left: bool

    @property
    def size(self) -> int:
        return len(self.start) + len(self.end)

    def around(self, tokens: I32) -> I32:
        return np.concatenate([self.start, tokens, self.end])


def frame_of(tokenizer: Any) -> Frame:
    """The frame of a tokenizer, by its own rules."""
    start, end = frame_tokens(tokenizer)
    pad = tokenizer.pad_token_id
    return Frame(
        as_tokens(start),
        as_tokens(end),
        0 if pad is None else int(pad),
        getattr(tokenizer, "padding_side", "right") == "left",
    )


def longest_row(
    settings: CalibrateSettings, tokenizer: Any, positions: int | None, listener: Listener
) -> int:
    """``--seq-len``, or the model's maximum length if that is smaller, with a note."""
    known = [n for n in (positions, getattr(tokenizer, "model_max_length", None)) if n is not None]
    length = int(min([settings.seq_len, *known]))
    if length < settings.seq_len:
        listener.note(f"Rows have {length} tokens instead of {settings.seq_len}: the model takes no more.")
    return length


def read_passages(
    texts: Iterable[str], tokenizer: Any, settings: CalibrateSettings, length: int, listener: Listener
) -> CalibrationText:
    """Tokenize, pack and frame until both splits are full; raises :class:`InputError` if there is too little text."""
    frame = frame_of(tokenizer)
    inner = length - frame.size
    if inner < 1:
        raise InputError(
            f"--seq-len {length} leaves no room for text next to {frame.size} special tokens: raise it."
        )
    want = settings.samples * inner
    packed: list[I32] = []
    held: list[I32] = []
    have = 0
    with listener.task("Reading text", want, "tokens") as task:
        for number, ids in enumerate(_tokenized(texts, tokenizer, max(want, length))):
            if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
                if len(held) < settings.heldout_samples and len(ids) >= _SHORTEST:
                    held.append(frame.around(ids[:inner]))
            elif have < want:
                row = np.concatenate([ids, frame.end])[: want - have]
                packed.append(row)
                have += len(row)
                task.advance(len(row))
            if have >= want and len(held) >= settings.heldout_samples:
                break
    if have < inner or not held:
        raise InputError(
            f"The calibration text gives {have:,} calibration tokens and {len(held)} held-out documents, less than "
            f"one row of {length} and one document: give more text (every {HELD_OUT_EVERY}th document is held out) "
            "or lower --seq-len."
        )
    if have < want or len(held) < settings.heldout_samples:
        listener.note(
            f"The text gives {have:,} calibration tokens of {want:,} and {len(held)} held-out documents of "
            f"{settings.heldout_samples} asked for; all are used."
        )
    flat = np.concatenate(packed)
    rows = flat[: len(flat) // inner * inner].reshape(-1, inner)
    heldout = np.full((len(held), max(map(len, held))), frame.pad, dtype=np.int32)
    document = np.full_like(heldout, PADDING)
    for i, row in enumerate(held):
        heldout[i, : len(row)], document[i, : len(row)] = row, i
    none = np.zeros(
        (0, length), dtype=np.int32
    )  # an encoder predicts no tokens, so there is no selection text
    return CalibrationText(
        np.stack([frame.around(r) for r in rows]), none, none, heldout, document, frame.start
    )


def _tokenized(texts: Iterable[str], tokenizer: Any, need: int) -> Iterator[I32]:
    for text in texts:
        if text.strip():
            yield token_ids(tokenizer, text, need)


def heldout_rows(text: CalibrationText, names: Iterable[str]) -> list[dict[str, NDArray[Any]]]:
    """The held-out documents as batches of one, with token types if they are among the inputs ``names``."""
    rows = []
    for ids, document in zip(text.heldout, text.heldout_document, strict=True):
        row = {TOKENS: ids[document != PADDING].astype(np.int64)[None]}
        if TOKEN_TYPES in names:
            row[TOKEN_TYPES] = np.zeros_like(row[TOKENS])
        rows.append(row)
    return rows
