"""Text for calibration, selection and held-out evaluation: files, folders, Hub data sets, or the model itself.

A source is a stream of documents. Of every eight documents, one is held out to measure the method's loss: neither
the fit nor the choice of layers uses it. One is for selection: the cost of replacing layers is measured on it. Six are
for calibration. Documents are tokenized, joined with the end-of-text token and cut into rows of ``seq_len`` tokens,
as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.media_ids import FIRST, are_media
from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.errors import InputError
from nbl_export.models.load import refused
from nbl_export.models.media_tokens import MediaTokens, load_media, save_media
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.tensorfile import load_as, save_tensors

I32 = NDArray[np.int32]
HELD_OUT_EVERY = 8
FORMAT = "nbl-export/text/2"
MEDIA = "media.safetensors"  # beside the text
CALIBRATION, SELECTION, HELDOUT = "calibration", "selection", "held-out"
# The selection and held-out documents of every HELD_OUT_EVERY; the others are for calibration.
_SPLIT_AT = {HELD_OUT_EVERY // 2 - 1: SELECTION, HELD_OUT_EVERY - 1: HELDOUT}
# Characters that are tokenized of a document for each token that is still needed: ordinary text has four, so that no
# token of it is lost.
_PER_TOKEN = 16


@dataclass(frozen=True)
class CalibrationText:
    """Token ids, packed.

    ``calibration`` is [samples, seq_len]; ``selection`` and ``heldout`` are [rows, seq_len] of documents that are in
    no other split. ``…_document`` is the document number of each of their tokens, -1 for padding. ``start`` [n] are
    the tokens at the start of a prompt. All are int32. An encoder's ``selection`` has no rows. ``media`` is what is
    known of the tokens that stand for images and sounds, if there are any; they belong to document -1.
    """

    calibration: I32
    selection: I32
    selection_document: I32
    heldout: I32
    heldout_document: I32
    start: I32
    media: MediaTokens | None = None

    def prompt(self, tokens: I32) -> I32:
        """``tokens`` as a prompt, with the start tokens first."""
        return np.concatenate([self.start, tokens])


# packing -----------------------------------------------------------------------------------------


def split_of(number: int) -> str:
    """The split of the document with that number, counted from 0."""
    return _SPLIT_AT.get(number % HELD_OUT_EVERY, CALIBRATION)


def pack(
    texts: Iterable[str], tokenizer: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationText:
    """Tokenize and pack until all splits are full; raises :class:`InputError` if there is too little text.

    Fewer rows than requested are used, with a note, if there is at least one full row for each split.
    """
    end = as_tokens([end_token(tokenizer)])
    length = settings.seq_len
    want = {split: rows * length for split, rows in rows_by_split(settings).items()}
    tokens: dict[str, list[I32]] = {split: [] for split in want}
    owners: dict[str, list[I32]] = {split: [] for split in want}
    have = dict.fromkeys(want, 0)
    with listener.task("Reading text", sum(want.values()), "tokens") as task:
        for number, text in enumerate(t for t in texts if t.strip()):
            split = split_of(number)
            if have[split] < want[split]:
                ids = token_ids(tokenizer, text, want[split] - have[split])
                row = np.append(ids, end)[: want[split] - have[split]]
                tokens[split].append(row)
                owners[split].append(np.full(len(row), number, dtype=np.int32))
                have[split] += len(row)
                task.advance(len(row))
            if all(have[k] >= want[k] for k in want):
                break
    for split in want:
        if have[split] < length:
            raise InputError(
                f"The calibration text gives {have[split]:,} {split} tokens, less than one row of {length}: give more "
                f"text (of every {HELD_OUT_EVERY} documents one is held out, and one is for choosing layers) or lower "
                "--seq-len."
            )
        if have[split] < want[split]:
            listener.note(
                f"The text gives {have[split]:,} {split} tokens of the {want[split]:,} asked for; all are used."
            )

    def rows(documents: list[I32]) -> I32:
        flat = np.concatenate(documents)
        return flat[: len(flat) // length * length].reshape(-1, length)

    return CalibrationText(
        rows(tokens[CALIBRATION]),
        rows(tokens[SELECTION]),
        rows(owners[SELECTION]),
        rows(tokens[HELDOUT]),
        rows(owners[HELDOUT]),
        start_tokens(tokenizer),
    )


def rows_by_split(settings: CalibrateSettings) -> dict[str, int]:
    """The requested number of rows of each split."""
    return {
        CALIBRATION: settings.samples,
        SELECTION: settings.selection_samples,
        HELDOUT: settings.heldout_samples,
    }


def token_ids(tokenizer: Any, text: str, need: int) -> I32:
    """The tokens of the start of ``text`` without special tokens: ``need`` of them, or more, or all there are.

    Raises :class:`InputError` if the tokenizer fails.
    """
    try:
        ids = tokenizer(text[: need * _PER_TOKEN], add_special_tokens=False, verbose=False)["input_ids"]
        return as_tokens(ids)
    except BaseException as error:  # a panic of the library is no Exception
        raise refused(f"The tokenizer fails on the text that begins with {text[:20]!r}", error) from None


def as_tokens(ids: Sequence[int]) -> I32:
    """``ids`` as int32; raises :class:`InputError` for one that no model has."""
    try:
        return np.array(ids, dtype=np.int32)
    except OverflowError:
        odd = max(ids, key=abs)
        raise InputError(
            f"The tokenizer gives the token {odd:,}, which no model has an embedding of: use the tokenizer that the "
            "model was trained with."
        ) from None


def check_tokens(text: CalibrationText, embedded: int, source: str) -> CalibrationText:
    """``text``, if the model has an embedding for each of its tokens; raises :class:`InputError` otherwise."""
    for rows in (text.calibration, text.selection, text.heldout, text.start):
        ids = rows[~are_media(rows)]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < embedded:
            odd = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise InputError(
                f"The tokenizer of {source} gives the token {odd:,}, the model has embeddings of {embedded:,} tokens: "
                "use the tokenizer that the model was trained with."
            )
    return text


def end_token(tokenizer: Any) -> int:
    """The token that separates packed documents: end of text, else padding, else 0."""
    known = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((int(t) for t in known if t is not None), 0)


def frame_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after a text, found by tokenizing one letter."""
    try:
        framed, plain = (
            tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
            for special in (True, False)
        )
    except BaseException as error:  # a panic of the library is no Exception
        raise refused("The tokenizer fails on the text 'a'", error) from None
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), len(framed))
    return framed[:at], framed[at + len(plain) :]


def start_tokens(tokenizer: Any) -> I32:
    """The tokens at the start of a prompt: by the tokenizer's own rules, else its beginning-of-text token.

    [n] int32; n is 0 for a tokenizer with neither.
    """
    own, _ = frame_tokens(tokenizer)
    if not own and tokenizer.bos_token_id is not None:
        own = [tokenizer.bos_token_id]
    return as_tokens(own)


# on disk -----------------------------------------------------------------------------------------


def save_text(path: Path, text: CalibrationText) -> None:
    """Write the packed tokens, atomically, and what is known of their images and sounds beside them."""
    if text.media is not None:
        save_media(path.with_name(MEDIA), text.media)
    names = [name for name in CalibrationText.__annotations__ if name != "media"]
    save_tensors(path, FORMAT, {name: getattr(text, name) for name in names})


def load_text(path: Path) -> CalibrationText:
    """Read what :func:`save_text` wrote; raises :class:`InputError` for anything else."""
    text = load_as(CalibrationText, path, FORMAT, CALIBRATE_AGAIN)
    rows = (text.calibration, text.selection, text.selection_document, text.heldout, text.heldout_document)
    fits = all(r.ndim == 2 and r.shape[1] for r in rows) and text.start.ndim == 1 and len(text.calibration)
    same = text.selection.shape == rows[2].shape and text.heldout.shape == rows[4].shape
    tokens = (text.calibration, text.selection, text.heldout, text.start)
    if not (fits and same and all(a.dtype == np.int32 for a in (*rows, text.start))):
        raise InputError(f"{path} is damaged (its arrays are not rows of tokens): {CALIBRATE_AGAIN}.")
    if any(int(a.min(initial=0)) < 0 for a in tokens):
        raise InputError(f"{path} is damaged (a token is negative): {CALIBRATE_AGAIN}.")
    last = max(int(a.max(initial=0)) for a in tokens)
    if not are_media(last):
        return text
    media = load_media(path.with_name(MEDIA), CALIBRATE_AGAIN)
    if last - FIRST >= len(media):
        raise InputError(f"{path} is damaged (a token of no image or sound): {CALIBRATE_AGAIN}.")
    return replace(text, media=media)
