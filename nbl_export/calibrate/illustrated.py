"""Documents with images: read from .jsonl files, and packed into rows with the tokens of their images.

A row of such a file has the text, with the placeholder of the model's processor where an image is, and the images:

    {"text": "What is this? <image>\\nA cat on a mat.", "images": ["photos/cat.jpg"]}

Images are files in the folder of the .jsonl file or below it; nothing is fetched. Rows without images are text, as in
any other file. An image is never cut by the end of a row: what is left of a row that a document with images does not
fit into is filled with the document's own words.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.batch.image_ids import are_images, words
from nbl_export.calibrate.documents import documents, field_of, lines_of, local_files, open_packed
from nbl_export.calibrate.images import open_image
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
from nbl_export.models.image_tokens import ImageTokens
from nbl_export.models.towers import Seen
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings

IMAGES = "images"
# Of one document: what takes more is no example of how a model is used.
_MOST_IMAGES, _MOST_TEXT = 64, 1 << 20
# Of a split: words for the prompts of parity and for the proof are taken from them.
_FEWEST_WORDS = 16
_OF_IMAGE = -1  # the document of a token that is no word: nobody predicts it
_COLUMNS = ("features", "offsets", "steps", "block")

See = Callable[[str, Sequence[Any], str], Seen]


@dataclass(frozen=True)
class Document:
    """A text and the files of its images, which was read at ``where``."""

    text: str
    images: tuple[Path, ...]
    where: str


def illustrated(sources: Iterable[str], field: str) -> Iterator[str | Document]:
    """The documents of ``sources``, those with images as :class:`Document`.

    Raises the errors of :func:`documents`, and :class:`InputError` for an image that is not there, or not below the
    folder of the file that names it.
    """
    return documents(sources, field, _read)


def words_alone(found: Iterable[str | Document]) -> Iterator[str]:
    """The texts of ``found``; raises :class:`HasImages` at the first document with images."""
    for document in found:
        if isinstance(document, Document):
            raise HasImages
        yield document


class HasImages(Exception):
    """Not every document is text alone."""


def _read(row: Any, field: str, where: str, folder: Path | None) -> str | Document:
    text = field_of(row, field, where, folder)
    names = row.get(IMAGES) or []
    if folder is None or not names:
        return text
    if not isinstance(names, list) or len(names) > _MOST_IMAGES:
        raise InputError(
            f"{where}: {IMAGES!r} is no list of up to {_MOST_IMAGES} file names: correct the row."
        )
    if len(text) > _MOST_TEXT:
        raise InputError(f"{where}: a text with images of more than {_MOST_TEXT:,} characters: cut it.")
    files = tuple(member(folder, name, f"{where}: the image") for name in names)
    if missing := next((file for file in files if not file.is_file()), None):
        raise InputError(
            f"{where}: the image {missing} does not exist: correct the row, or put the file there."
        )
    return Document(text, files, where)


def image_files(sources: Iterable[str]) -> list[Path]:
    """The files that the rows of local .jsonl files among ``sources`` name as images, those that there are."""
    found: dict[Path, None] = {}
    for source in sources:
        for path in local_files(source) or ():
            if ".jsonl" not in path.suffixes:
                continue
            with open_packed(path) as raw:
                text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="\n")
                for line in lines_of(path, text):
                    for name in _named(line) if f'"{IMAGES}"' in line else ():
                        with suppress(InputError):  # packing says what is wrong with it
                            found[member(path.parent, name, "")] = None
    return [path for path in found if path.is_file()]


def _named(line: str) -> list[Any]:
    try:
        row = parse_json(line)
    except ValueError:
        return []
    names = row.get(IMAGES) if isinstance(row, dict) else None
    return names if isinstance(names, list) else []


def pack_illustrated(
    found: Iterable[str | Document], see: See, tokenizer: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationText:
    """Tokenize and pack documents of which some have images until all splits are full.

    ``see`` makes the tokens of a document with images. Raises :class:`InputError` if a split has not one full row, has
    hardly any words, or if an image does not fit into a row.
    """
    splits = {name: _Rows(rows, settings.seq_len) for name, rows in rows_by_split(settings).items()}
    end, seen, total = as_tokens([end_token(tokenizer)]), [], sum(rows_by_split(settings).values())
    with listener.task("Reading text and images", total, "rows") as task:
        for number, document in enumerate(d for d in found if not isinstance(d, str) or d.strip()):
            rows = splits[split_of(number)]
            if not rows.full:
                before = len(rows.rows)
                if isinstance(document, str):
                    need = rows.want * settings.seq_len
                    rows.add(np.append(token_ids(tokenizer, document, need)[:need], end), number)
                else:
                    images = [open_image(file) for file in document.images]
                    one = see(document.text, images, document.where)
                    rows.add_whole(np.append(one.ids, end), number, document.where)
                    rows.seen.append((one.ids[are_images(one.ids)], len(images)))
                    seen.append(one.images)
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
    joined = {name: np.concatenate([getattr(one, name) for one in seen]) for name in _COLUMNS}
    both_ways = np.max([one.both_ways for one in seen], axis=0)
    return replace(text, images=ImageTokens(**joined, both_ways=both_ways))


def _check(splits: dict[str, _Rows], length: int) -> None:
    for name, split in splits.items():
        if not split.rows:
            raise InputError(
                f"The calibration text gives less than one {name} row of {length} tokens: give more documents (of "
                f"every {HELD_OUT_EVERY} one is held out, and one is for choosing layers) or lower --seq-len."
            )
        if int((~are_images(np.stack(split.rows))).sum()) < _FEWEST_WORDS:
            raise InputError(f"The {name} documents are nearly without words: give texts with the images.")


def _said(splits: dict[str, _Rows]) -> str:
    parts = []
    for name, split in splits.items():
        rows = np.stack(split.rows)
        of_images = int(are_images(rows).sum())
        parts.append(f"{name} {split.images:,} ({of_images:,} of {rows.size:,} tokens)")
    return f"Images: {', '.join(parts)}; losses are of the words alone."


class _Rows:
    """The rows of a split, which are filled one after the other.

    ``seen`` are the tokens of the images of each document, and their number.
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
    def images(self) -> int:
        """The number of images in the rows; of a document that was cut, by the share of their tokens."""
        there = np.stack(self.rows)
        return sum(round(count * float(np.isin(ids, there).mean())) for ids, count in self.seen)

    def add(self, ids: I32, number: int) -> None:
        """Add the tokens ``ids`` of the document ``number``, which may be cut anywhere."""
        owner = np.where(are_images(ids), _OF_IMAGE, number).astype(np.int32)
        self._tokens, self._owners = np.append(self._tokens, ids), np.append(self._owners, owner)
        while len(self._tokens) >= self.length and not self.full:
            self.rows.append(self._tokens[: self.length].astype(np.int32))
            self.owners.append(self._owners[: self.length].astype(np.int32))
            self._tokens, self._owners = self._tokens[self.length :], self._owners[self.length :]

    def add_whole(self, ids: I32, number: int, where: str) -> None:
        """Add a document whose images must not be cut; what does not fit into a row of its own is left out."""
        if len(ids) > self.length - len(self._tokens) and len(self._tokens):
            self._fill(words(ids), number)
        if len(ids) > self.length:
            cut = self.length
            while cut and are_images(ids[cut]) and are_images(ids[cut - 1]):
                cut -= 1
            if not are_images(ids[:cut]).any():
                raise InputError(
                    f"{where}: its first image ends beyond {self.length} tokens: raise --seq-len (the document has "
                    f"{len(ids):,})."
                )
            self.add(ids[:cut], number)
            if cut < self.length:
                self._fill(words(ids), number)
            return
        self.add(ids, number)

    def _fill(self, text: I32, number: int) -> None:
        """End the row that is begun with ``text``."""
        self.add(np.resize(text, self.length - len(self._tokens)), number)
