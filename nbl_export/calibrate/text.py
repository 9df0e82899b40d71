"""Pack text into rows of tokens: for calibration, selection and held-out evaluation; for encoders with special tokens.

A source is a stream of documents. Of every eight documents, one is held out to measure the method's loss: neither
the fit nor the choice of layers uses it. One is for selection: the cost of replacing layers is measured on it. Six are
for calibration. Documents are tokenized, joined with the end-of-text token and cut into rows of ``seq_len`` tokens,
as in the paper's code.

An encoder's calibration rows are packed as well, and special tokens of the tokenizer, such as [CLS] … [SEP], are added
to each; its held-out row is one document with special tokens and padding, since it computes one vector of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import FIRST, TOKEN_TYPES, TOKENS, are_media, words
from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.errors import InputError
from nbl_export.models.media_tokens import MediaTokens, joined
from nbl_export.models.stored import refused
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.tensorfile import load_as, save_tensors

I32 = NDArray[np.int32]
HELD_OUT_EVERY = 8
FORMAT, MEDIA_FORMAT = "nbl-export/text/2", "nbl-export/media-tokens/1"
MEDIA = "media.safetensors"  # beside the text
CALIBRATION, SELECTION, HELDOUT = "calibration", "selection", "held-out"
# The selection and held-out documents of every HELD_OUT_EVERY; the others are for calibration.
_SPLIT_AT = {HELD_OUT_EVERY // 2 - 1: SELECTION, HELD_OUT_EVERY - 1: HELDOUT}
# Characters that are tokenized of a document for each token that is still needed: ordinary text has four, so that no
# token of it is lost.
_PER_TOKEN = 16
# Of a split with images: words for the prompts of parity and for the proof are taken from them.
_FEWEST_WORDS = 16
PADDING = -1  # the document of a token that nobody predicts: padding, or the embedding of an image
_SHORTEST = 8  # the minimum number of tokens of an encoder's held-out document


@dataclass(frozen=True)
class CalibrationText:
    """Token ids, packed.

    ``calibration`` is [samples, seq_len]; ``selection`` and ``heldout`` are [rows, seq_len] of documents that are in
    no other split. ``…_document`` is the document number of each of their tokens, -1 for padding. ``start`` [n] are
    the tokens at the start of a prompt. All are int32. An encoder's ``selection`` has no rows. ``media`` is what is
    known of the tokens that stand for images, if there are any; they belong to document -1.
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


@dataclass(frozen=True)
class Document:
    """A text and the files of its images, which was read at ``where``."""

    text: str
    images: tuple[Path, ...]
    where: str


# Makes the tokens of a document, and what is known of those of its images.
See = Callable[[Document], tuple[I32, MediaTokens]]


# packing -----------------------------------------------------------------------------------------


class _Split:
    """``want`` rows of ``length`` tokens, which are filled one after the other."""

    def __init__(self, want: int, length: int) -> None:
        self.want, self.length, self.size = want, length, 0
        self.tokens, self.owners = [as_tokens([])], [as_tokens([])]

    @property
    def need(self) -> int:
        """The tokens that are still wanted."""
        return self.want * self.length - self.size

    def add(self, ids: I32, number: int) -> None:
        """Add the tokens ``ids`` of the document ``number``, which may be cut anywhere."""
        self.tokens.append(ids)
        self.owners.append(np.where(are_media(ids), PADDING, number))
        self.size += len(ids)

    def add_whole(self, ids: I32, number: int, where: str) -> None:
        """Add a document whose images must not be cut; what does not fit into a row of its own is left out.

        What is left of a row that it does not fit into is filled with its own words.
        """
        begun = self.size % self.length
        if len(ids) > self.length - begun and begun:
            self.add(np.resize(words(ids), self.length - begun), number)
        cut = min(self.length, len(ids))
        while 0 < cut < len(ids) and are_media(ids[cut]) and are_media(ids[cut - 1]):
            cut -= 1
        if cut < len(ids) and not are_media(ids[:cut]).any():
            raise InputError(
                f"{where}: its first image ends beyond {self.length} tokens: raise --seq-len (the document has "
                f"{len(ids):,})."
            )
        self.add(ids[:cut], number)
        if cut < min(self.length, len(ids)):
            self.add(np.resize(words(ids), self.length - cut), number)

    def rows(self) -> tuple[I32, I32]:
        """The full rows of tokens, and the document of each token: two of [rows, length], int32."""
        count = min(self.want, self.size // self.length)
        both = (np.concatenate(parts)[: count * self.length] for parts in (self.tokens, self.owners))
        tokens, owners = (flat.reshape(count, self.length).astype(np.int32) for flat in both)
        return tokens, owners


def pack(
    found: Iterable[str | Document],
    tokenizer: Any,
    settings: CalibrateSettings,
    listener: Listener,
    see: See | None = None,
) -> CalibrationText:
    """Tokenize and pack until all splits are full; ``see`` makes the tokens of documents with images.

    Fewer rows than requested are used, with a note, if there is at least one full row for each split. Raises
    :class:`InputError` if there is too little text, or if an image does not fit into a row.
    """
    length, end = settings.seq_len, as_tokens([end_token(tokenizer)])
    splits = {name: _Split(rows, length) for name, rows in rows_by_split(settings).items()}
    media: list[MediaTokens] = []
    with listener.task("Reading text", sum(s.need for s in splits.values()), "tokens") as task:
        for number, document in enumerate(d for d in found if not isinstance(d, str) or d.strip()):
            split = splits[_SPLIT_AT.get(number % HELD_OUT_EVERY, CALIBRATION)]
            if (need := split.need) > 0:
                if isinstance(document, str):
                    split.add(np.append(token_ids(tokenizer, document, need), end)[:need], number)
                else:
                    assert see is not None
                    ids, tokens = see(document)
                    split.add_whole(np.append(ids, end), number, document.where)
                    media.append(tokens)
                task.advance(need - max(split.need, 0))
            if all(split.need <= 0 for split in splits.values()):
                break
    made = {name: split.rows() for name, split in splits.items()}
    for name, split in splits.items():
        rows, _ = made[name]
        if not len(rows):
            raise InputError(
                f"The calibration text gives {split.size:,} {name} tokens, less than one row of {length}: give more "
                f"text (of every {HELD_OUT_EVERY} documents one is held out, and one is for choosing layers) or lower "
                "--seq-len."
            )
        if split.need > 0:
            listener.note(
                f"The text gives {split.size:,} {name} tokens of the {split.want * length:,} asked for; all are used."
            )
        if media and (~are_media(rows)).sum() < _FEWEST_WORDS:
            raise InputError(f"The {name} documents are nearly without words: give texts with the images.")
    if media:
        of_images = ", ".join(
            f"{int(are_media(rows).sum()):,} of {rows.size:,} {name} tokens"
            for name, (rows, _) in made.items()
        )
        listener.note(f"Images are {of_images}; losses are of the words alone.")
    return CalibrationText(
        made[CALIBRATION][0],
        *made[SELECTION],
        *made[HELDOUT],
        start_tokens(tokenizer),
        joined(media) if media else None,
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
    """``ids`` as int32."""
    return np.array(ids, dtype=np.int32)


def check_tokens(text: CalibrationText, embedded: int, source: str) -> CalibrationText:
    """``text``, if the model has an embedding for each of its tokens; raises :class:`InputError` otherwise."""
    for rows in (text.calibration, text.selection, text.heldout, text.start):
        ids = rows[~are_media(rows)]
        if ids.size and int(ids.max()) >= embedded:
            raise InputError(
                f"The tokenizer of {source} gives the token {int(ids.max()):,}, the model has embeddings of "
                f"{embedded:,} tokens: use the tokenizer that the model was trained with."
            )
    return text


def end_token(tokenizer: Any) -> int:
    """The token that separates packed documents: end of text, else padding, else 0."""
    known = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((int(t) for t in known if t is not None), 0)


def start_tokens(tokenizer: Any) -> I32:
    """The tokens at the start of a prompt: by the tokenizer's own rules, else its beginning-of-text token.

    [n] int32; n is 0 for a tokenizer with neither.
    """
    own = frame_of(tokenizer).start
    return own if len(own) or tokenizer.bos_token_id is None else as_tokens([tokenizer.bos_token_id])


# encoders ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The special tokens around an encoder's text, and the padding of a batch."""

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
    """The frame of a tokenizer: the special tokens that it adds before and after one letter."""
    framed, plain = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (True, False)
    )
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), len(framed))
    start, end = as_tokens(framed[:at]), as_tokens(framed[at + len(plain) :])
    return Frame(start, end, int(tokenizer.pad_token_id or 0), tokenizer.padding_side == "left")


def longest_row(
    settings: CalibrateSettings, tokenizer: Any, positions: int | None, listener: Listener
) -> int:
    """``--seq-len``, or the model's maximum length if that is smaller, with a note."""
    known = [n for n in (positions, tokenizer.model_max_length) if n is not None]
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
    split, held = _Split(settings.samples, inner), list[I32]()
    with listener.task("Reading text", split.need, "tokens") as task:
        for number, text in enumerate(t for t in texts if t.strip()):
            need = split.need
            ids = token_ids(tokenizer, text, max(need, length))
            if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
                if len(held) < settings.heldout_samples and len(ids) >= _SHORTEST:
                    held.append(frame.around(ids[:inner]))
            elif need > 0:
                split.add(np.append(ids, frame.end)[:need], number)
                task.advance(need - split.need)
            if split.need <= 0 and len(held) >= settings.heldout_samples:
                break
    rows, _ = split.rows()
    if not len(rows) or not held:
        raise InputError(
            f"The calibration text gives {split.size:,} calibration tokens and {len(held)} held-out documents, less "
            f"than one row of {length} and one document: give more text (every {HELD_OUT_EVERY}th document is held "
            "out) or lower --seq-len."
        )
    if split.need > 0 or len(held) < settings.heldout_samples:
        listener.note(
            f"The text gives {split.size:,} calibration tokens of {settings.samples * inner:,} and {len(held)} "
            f"held-out documents of {settings.heldout_samples} asked for; all are used."
        )
    heldout = np.full((len(held), max(map(len, held))), frame.pad, dtype=np.int32)
    document = np.full_like(heldout, PADDING)
    for i, row in enumerate(held):
        heldout[i, : len(row)], document[i, : len(row)] = row, i
    none = np.zeros((0, length), dtype=np.int32)  # an encoder predicts no tokens: there is no selection text
    framed = np.stack([frame.around(row) for row in rows])
    return CalibrationText(framed, none, none, heldout, document, frame.start)


def heldout_rows(text: CalibrationText, names: Iterable[str]) -> list[dict[str, NDArray[Any]]]:
    """The held-out documents as batches of one, with token types if they are among the inputs ``names``."""
    rows = []
    for ids, document in zip(text.heldout, text.heldout_document, strict=True):
        row = {TOKENS: ids[document != PADDING].astype(np.int64)[None]}
        rows.append(row | ({TOKEN_TYPES: np.zeros_like(row[TOKENS])} if TOKEN_TYPES in names else {}))
    return rows


# on disk -----------------------------------------------------------------------------------------


def save_text(path: Path, text: CalibrationText) -> None:
    """Write the packed tokens, atomically, and what is known of their images beside them."""
    if text.media is not None:
        save_tensors(path.with_name(MEDIA), MEDIA_FORMAT, vars(text.media))
    save_tensors(path, FORMAT, {name: rows for name, rows in vars(text).items() if name != "media"})


def load_text(path: Path) -> CalibrationText:
    """Read what :func:`save_text` wrote; raises :class:`InputError` for anything else."""
    text = load_as(CalibrationText, path, FORMAT, CALIBRATE_AGAIN)
    last = max(int(a.max(initial=0)) for a in (text.calibration, text.selection, text.heldout))
    if not are_media(last):
        return text
    media = load_as(MediaTokens, path.with_name(MEDIA), MEDIA_FORMAT, CALIBRATE_AGAIN)
    if last - FIRST >= len(media):
        raise InputError(f"{path} is damaged (a token of no image): {CALIBRATE_AGAIN}.")
    return replace(text, media=media)
