"""Documents with images and sounds: read from .jsonl files, and packed into rows with the tokens of these.

A row of such a file has the text, with the placeholder of the model's processor where an image or a sound is, and their
files:

    {"text": "What is this? <image>\\nA cat on a mat.", "images": ["photos/cat.jpg"]}
    {"text": "<|AUDIO|> Who speaks?", "audio": ["sounds/talk.wav"]}

The files are in the folder of the .jsonl file or below it; nothing is fetched. Rows without images and sounds are text,
as in any other file. Neither is ever cut by the end of a row: what is left of a row that a document does not fit into
is filled with the document's own words.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.batch.media_ids import are_media, words
from nbl_export.calibrate.documents import (
    check_readable,
    documents,
    field_of,
    lines_of,
    local_files,
    open_packed,
)
from nbl_export.calibrate.images import open_image
from nbl_export.calibrate.sounds import open_sound
from nbl_export.calibrate.text import (
    CALIBRATION,
    HELD_OUT_EVERY,
    HELDOUT,
    I32,
    SELECTION,
    CalibrationText,
    as_tokens,
    end_token,
    rows_by_split,
    split_of,
    start_tokens,
    token_ids,
)
from nbl_export.errors import InputError
from nbl_export.files import member, parse_json
from nbl_export.models.media_tokens import joined
from nbl_export.models.towers import Seen, Towers
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings

IMAGES, SOUNDS = "images", "audio"
# Of one document: what takes more is no example of how a model is used.
_MOST_FILES, _MOST_TEXT = 64, 1 << 20
# Of a split: words for the prompts of parity and for the proof are taken from them.
_FEWEST_WORDS = 16
_OF_MEDIA = -1  # the document of a token that is no word: nobody predicts it

# Makes the tokens of a document.
See = Callable[["Document"], Seen]


@dataclass(frozen=True)
class Document:
    """A text and the files of its images and of its sounds, which was read at ``where``."""

    text: str
    images: tuple[Path, ...]
    sounds: tuple[Path, ...]
    where: str

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.images, *self.sounds)


def illustrated(sources: Iterable[str], field: str) -> Iterator[str | Document]:
    """The documents of ``sources``, those with images or sounds as :class:`Document`.

    Raises the errors of :func:`documents`, and :class:`InputError` for a file that is not there, or not below the
    folder of the one that names it.
    """
    return documents(sources, field, _read)


def check_illustrated(sources: Iterable[str], field: str) -> None:
    """:func:`check_readable` of such documents."""
    check_readable(sources, field, _read)


def words_alone(found: Iterable[str | Document]) -> Iterator[str]:
    """The texts of ``found``; raises :class:`HasMedia` at the first document with images or sounds."""
    for document in found:
        if isinstance(document, Document):
            raise HasMedia
        yield document


class HasMedia(Exception):
    """Not every document is text alone."""


def _read(row: Any, field: str, where: str, folder: Path | None) -> str | Document:
    text = field_of(row, field, where, folder)
    names = {key: row.get(key) or [] for key in (IMAGES, SOUNDS)}
    if folder is None or not any(names.values()):
        return text
    if len(text) > _MOST_TEXT:
        raise InputError(
            f"{where}: a text with images or sounds of more than {_MOST_TEXT:,} characters: cut it."
        )
    images, sounds = (
        _files(folder, key, names[key], where, kind) for key, kind in ((IMAGES, "image"), (SOUNDS, "sound"))
    )
    return Document(text, images, sounds, where)


def _files(folder: Path, key: str, names: Any, where: str, kind: str) -> tuple[Path, ...]:
    if not isinstance(names, list) or len(names) > _MOST_FILES:
        raise InputError(f"{where}: {key!r} is no list of up to {_MOST_FILES} file names: correct the row.")
    files = tuple(member(folder, name, f"{where}: the {kind}") for name in names)
    if missing := next((file for file in files if not file.is_file()), None):
        raise InputError(
            f"{where}: the {kind} {missing} does not exist: correct the row, or put the file there."
        )
    return files


def media_files(sources: Iterable[str]) -> list[Path]:
    """The files that the rows of local .jsonl files among ``sources`` name as images and sounds, those there are."""
    found: dict[Path, None] = {}
    for source in sources:
        for path in local_files(source) or ():
            if ".jsonl" not in path.suffixes:
                continue
            with open_packed(path) as raw:
                text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="\n")
                for line in lines_of(path, text):
                    for name in _named(line):
                        with suppress(InputError):  # packing says what is wrong with it
                            found[member(path.parent, name, "")] = None
    return [path for path in found if path.is_file()]


def _named(line: str) -> list[Any]:
    if not any(f'"{key}"' in line for key in (IMAGES, SOUNDS)):
        return []
    try:
        row = parse_json(line)
    except ValueError:
        return []
    lists = [row.get(key) for key in (IMAGES, SOUNDS)] if isinstance(row, dict) else []
    return [name for names in lists if isinstance(names, list) for name in names]


def seen_by(towers: Towers) -> See:
    """How ``towers`` make the tokens of a document; the files of its images and sounds are read."""

    def see(document: Document) -> Seen:
        images = [open_image(file) for file in document.images]
        rate = towers.sampling_rate(document.where) if document.sounds else 0
        sounds = [open_sound(file, rate) for file in document.sounds]
        return towers.read(document.text, images, sounds, document.where)

    return see


def pack_illustrated(
    found: Iterable[str | Document], see: See, tokenizer: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationText:
    """Tokenize and pack documents of which some have images or sounds until all splits are full.

    ``see`` makes the tokens of such a document. Raises :class:`InputError` if a split has not one full row, has hardly
    any words, or if an image or a sound does not fit into a row.
    """
    splits = {name: _Rows(rows, settings.seq_len) for name, rows in rows_by_split(settings).items()}
    end, seen, total = as_tokens([end_token(tokenizer)]), [], sum(rows_by_split(settings).values())
    with listener.task("Reading text, images and sounds", total, "rows") as task:
        for number, document in enumerate(d for d in found if not isinstance(d, str) or d.strip()):
            rows = splits[split_of(number)]
            if not rows.full:
                before = len(rows.rows)
                if isinstance(document, str):
                    need = rows.want * settings.seq_len
                    rows.add(np.append(token_ids(tokenizer, document, need)[:need], end), number)
                else:
                    one = see(document)
                    rows.add_whole(np.append(one.ids, end), number, document.where)
                    rows.seen.append((one.ids[are_media(one.ids)], len(document.files)))
                    seen.append(one.media)
                task.advance(len(rows.rows) - before)
            if all(split.full for split in splits.values()):
                break
    _check(splits, settings.seq_len)
    for name, split in splits.items():
        if not split.full:
            listener.note(
                f"The text gives {len(split.rows)} {name} rows of the {split.want} asked for; all are used."
            )
    listener.note(_said(splits))
    tokens = {name: np.stack(split.rows) for name, split in splits.items()}
    owners = {name: np.stack(split.owners) for name, split in splits.items()}
    text = CalibrationText(
        tokens[CALIBRATION],
        tokens[SELECTION],
        owners[SELECTION],
        tokens[HELDOUT],
        owners[HELDOUT],
        start_tokens(tokenizer),
    )
    return replace(text, media=joined(seen))


def _check(splits: dict[str, _Rows], length: int) -> None:
    for name, split in splits.items():
        if not split.rows:
            raise InputError(
                f"The calibration text gives less than one {name} row of {length} tokens: give more documents (of "
                f"every {HELD_OUT_EVERY} one is held out, and one is for choosing layers) or lower --seq-len."
            )
        if int((~are_media(np.stack(split.rows))).sum()) < _FEWEST_WORDS:
            raise InputError(
                f"The {name} documents are nearly without words: give texts with the images and sounds."
            )


def _said(splits: dict[str, _Rows]) -> str:
    parts = []
    for name, split in splits.items():
        rows = np.stack(split.rows)
        parts.append(f"{name} {split.media:,} ({int(are_media(rows).sum()):,} of {rows.size:,} tokens)")
    return f"Images and sounds: {', '.join(parts)}; losses are of the words alone."


class _Rows:
    """The rows of a split, which are filled one after the other.

    ``seen`` are the tokens of the images and sounds of each document, and the number of these.
    """

    def __init__(self, want: int, length: int) -> None:
        self.want, self.length = want, length
        self.seen: list[tuple[I32, int]] = []
        self.rows: list[I32] = []
        self.owners: list[I32] = []
        self._tokens = self._owners = np.zeros(0, np.int32)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.want

    @property
    def media(self) -> int:
        """The number of images and sounds in the rows; of a document that was cut, by the share of their tokens."""
        there = np.stack(self.rows)
        return sum(round(count * float(np.isin(ids, there).mean())) for ids, count in self.seen)

    def add(self, ids: I32, number: int) -> None:
        """Add the tokens ``ids`` of the document ``number``, which may be cut anywhere."""
        owner = np.where(are_media(ids), _OF_MEDIA, number).astype(np.int32)
        self._tokens, self._owners = np.append(self._tokens, ids), np.append(self._owners, owner)
        while len(self._tokens) >= self.length and not self.full:
            self.rows.append(self._tokens[: self.length].astype(np.int32))
            self.owners.append(self._owners[: self.length].astype(np.int32))
            self._tokens, self._owners = self._tokens[self.length :], self._owners[self.length :]

    def add_whole(self, ids: I32, number: int, where: str) -> None:
        """Add a document whose media must not be cut; what does not fit into a row of its own is left out."""
        if len(ids) > self.length - len(self._tokens) and len(self._tokens):
            self._fill(words(ids), number)
        if len(ids) > self.length:
            cut = self.length
            while cut and are_media(ids[cut]) and are_media(ids[cut - 1]):
                cut -= 1
            if not are_media(ids[:cut]).any():
                raise InputError(
                    f"{where}: its first image or sound ends beyond {self.length} tokens: raise --seq-len (the "
                    f"document has {len(ids):,})."
                )
            self.add(ids[:cut], number)
            if cut < self.length:
                self._fill(words(ids), number)
            return
        self.add(ids, number)

    def _fill(self, text: I32, number: int) -> None:
        """End the row that is begun with ``text``."""
        self.add(np.resize(text, self.length - len(self._tokens)), number)
