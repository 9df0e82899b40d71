"""Read documents of calibration text and images: files, folders, patterns, and data sets of the Hub.

A vision encoder gets files, folders and patterns, of which every eighth image is held out from the fit. A row of a
.jsonl file for a multimodal model has the text, with the placeholder of the model's processor where an image is, and
the files, which are in the folder of the .jsonl file or below it; nothing is fetched:

    {"text": "What is this? <image>\\nA cat on a mat.", "images": ["photos/cat.jpg"]}
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from nbl_export.batch import F32, PIXELS
from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.calibrate.text import HELD_OUT_EVERY, Document
from nbl_export.errors import InputError, NblError, first_line
from nbl_export.files import member, parse_json, user_path
from nbl_export.packages import missing
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.settings.choices import SELF
from nbl_export.tensorfile import load_as, save_tensors

FORMAT = "nbl-export/images/1"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_FORMATS = (".txt", ".jsonl", ".parquet")
_WHAT = "The calibration text"
_LISTED = ".txt, .jsonl (.gz and .zst too) or .parquet"
# A plain text file is cut at line ends into documents of about this many characters, so that some of them can be
# held out.
_TXT_DOCUMENT = 8192
# Makes the document of a row: from the field of its text, where it stands, and the folder of its file.
Read = Callable[[Any, str, str, Path | None], Any]


def field_of(row: Any, field: str, where: str, _folder: Path | None = None) -> str:
    """The text of a row; raises :class:`InputError`, which names ``where`` it stands, if it has none."""
    if isinstance(row, dict) and isinstance(row.get(field, 0), str | None):
        return row[field] or ""  # an empty cell is a document without text, which packing skips
    names = [k for k, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
    has = ", ".join(names) or "none"
    raise InputError(f"{where}: no text field {field!r} (text fields: {has}); name it with --text-field.")


def documents(sources: Iterable[str], field: str, read: Read = field_of) -> Iterator[Any]:
    """The documents of all ``sources`` in order: files, folders, patterns, or data sets of the Hub as
    NAME[:CONFIG[:SPLIT]].

    ``read`` makes the document of a row: its text unless something else is wanted. Raises :class:`InputError` for an
    unknown format, a file that is not text, or a missing field.
    """
    for source in sources:
        files = local_files(source)
        for place in [source] if files is None else files:
            try:
                yield from (
                    _of_file(place, field, read) if isinstance(place, Path) else _of_hub(place, field, read)
                )
            except NblError:
                raise
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{place} is not UTF-8 text ({error.reason} at byte {error.start} of a block): convert it."
                ) from None
            except Exception as error:  # of a file, gzip, zstandard, Parquet or the Hub client
                if files is None and (several := re.search(r"available configs: \[(.*?)\]", str(error))):
                    names = several[1].replace("'", "")
                    raise InputError(
                        f"The data set {source} has several configurations ({names[:300]}): name one of them, as "
                        f"{source.partition(':')[0]}:{names.split(',')[0]}."
                    ) from None
                raise InputError(
                    f"{place} cannot be read ({first_line(error)}): download it again."
                    if files is not None
                    else f"The calibration text {source} is neither a local file or folder nor a data set "
                    f"(NAME, NAME:CONFIG or NAME:CONFIG:SPLIT) that can be read from the Hub ({first_line(error)}): "
                    "check the spelling and the network."
                ) from None


def named_files(source: str, what: str, wanted: Callable[[Path], bool]) -> list[Path]:
    """The file ``source``, those of a folder that are ``wanted``, or those of a pattern, in order; none are there."""
    path = user_path(source, what)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if wanted(p) and p.is_file())
    if path.is_file() or not any(c in source for c in "*?["):
        return [path] if path.is_file() else []
    # Path.glob takes no absolute patterns.
    return sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())  # noqa: PTH207


def local_files(source: str) -> list[Path] | None:
    """The files of a local source, in order; None for a source that must be a Hub data set.

    Raises :class:`InputError` for a path, folder or pattern without files.
    """
    if found := named_files(source, _WHAT, lambda p: _format(p) is not None):
        return found
    if os.path.lexists(user_path(source, _WHAT)) or any(c in source for c in "*?["):
        raise InputError(f"{source} has no calibration text: no {_LISTED} file is there.")
    check_there(source)
    return None


def check_there(source: str) -> None:
    """Refuse a ``source`` that does not exist and, since it reads like a path, is no Hub data set."""
    path = user_path(source, _WHAT)
    if os.path.lexists(path) or any(c in source for c in "*?["):
        return
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or _format(path) is not None:
        raise InputError(f"The calibration text {source} does not exist: check the path.")


def check_readable(sources: Iterable[str], field: str, read: Read = field_of) -> None:
    """Refuse, before any work, sources that are not there or cannot be read, as far as the first document shows.

    Raises the errors of :func:`documents`; nothing is said of Hub data sets.
    """
    for source in sources:
        files = local_files(source) or []
        for file in files:
            if _format(file) is None:
                raise InputError(f"{file} is not a calibration text: give a {_LISTED} file.")
        next(documents(map(str, files[:1]), field, read), None)


def _format(path: Path) -> str | None:
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    found = next((suffix for suffix in _FORMATS if plain.endswith(suffix)), None)
    return None if found == ".parquet" and plain != name else found  # that is compressed internally


def _of_file(path: Path, field: str, read: Read) -> Iterator[Any]:
    kind = _format(path)
    if kind == ".parquet":
        yield from _of_data_set("parquet", str(path), field, read, data_files=str(path))
        return
    how = {"encoding": "utf-8-sig", "newline": "\n", "compression": "infer"}
    with LocalFileSystem().open(str(path), "rt", **how) as text:
        yield from (_of_lines if kind == ".jsonl" else _of_txt)(path, text, field, read)


def _of_txt(path: Path, text: IO[str], _field: str, _read: Read) -> Iterator[str]:
    document: list[str] = []
    size = 0
    # A text without line ends is cut at any character.
    while piece := text.readline(_TXT_DOCUMENT):
        if "\0" in piece:
            raise InputError(f"{path} is not text: it has NUL bytes; give another file.")
        document.append(piece)
        size += len(piece)
        if size >= _TXT_DOCUMENT:
            yield "".join(document)
            document, size = [], 0
    if document:
        yield "".join(document)


def _of_lines(path: Path, text: IO[str], field: str, read: Read) -> Iterator[Any]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            # The message of an encoding error would quote the line.
            odd = isinstance(error, UnicodeError)
            reason = "half of a surrogate pair" if odd else getattr(error, "msg", str(error))
            raise InputError(
                f"{where}: not JSON ({reason}); a .jsonl file needs one object per line."
            ) from None
        yield read(row, field, where, path.parent)


def _of_data_set(
    path: str, where: str, field: str, read: Read, split: str = "train", **how: Any
) -> Iterator[Any]:
    import datasets

    for row in datasets.load_dataset(path, split=split, streaming=True, **how):
        yield read(row, field, where, None)


def _of_hub(source: str, field: str, read: Read) -> Iterator[Any]:
    name, config, split = (*source.split(":", 2), "", "")[:3]
    return _of_data_set(name, f"data set {source}", field, read, split or "train", name=config or None)


# images ------------------------------------------------------------------------------------------


def document_of(row: Any, field: str, where: str, folder: Path | None) -> str | Document:
    """The document of a row: its text alone, or with the files of its images.

    Raises :class:`InputError` for a file that is not there, or not below the ``folder`` of the one that names it.
    """
    text = field_of(row, field, where, folder)
    names = row.get("images") or []
    if folder is None or not names:
        return text
    if not isinstance(names, list):
        raise InputError(f"{where}: 'images' is no list of file names: correct the row.")
    images = tuple(member(folder, name, f"{where}: the image") for name in names)
    if gone := next((file for file in images if not file.is_file()), None):
        raise InputError(f"{where}: the image {gone} does not exist: correct the row, or put the file there.")
    return Document(text, images, where)


def images_in(sources: Iterable[str], field: str) -> list[Path]:
    """The files of images that the rows of local .jsonl files among ``sources`` name."""
    files = [file for source in sources if source != SELF for file in local_files(source) or ()]
    rows = documents([str(file) for file in files if ".jsonl" in file.suffixes], field, document_of)
    return [*dict.fromkeys(image for one in rows if isinstance(one, Document) for image in one.images)]


def open_image(file: Path) -> Any:
    """The image of ``file`` in red, green and blue, as pillow has it; raises :class:`InputError` if it is none.

    One of more pixels than pillow takes for a bomb is refused, too.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing("pillow", "Reading images") from None
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{file} is not a readable image: remove it, or download it again.") from None


# vision encoders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationImages:
    """``calibration`` and ``heldout``, each [images, channels, height, width] float32, as the model reads them."""

    calibration: F32
    heldout: F32


def image_files(sources: Iterable[str]) -> list[Path]:
    """The image files that ``sources`` name, in order; raises :class:`InputError` for a source without images."""
    found: list[Path] = []
    for source in sources:
        files = named_files(source, "The calibration images", lambda p: p.suffix.lower() in _SUFFIXES)
        if not files:
            raise InputError(
                f"{source} names no image: give files, folders or patterns of {', '.join(_SUFFIXES)}."
            )
        found += files
    return found


def read_images(
    files: Sequence[Path], processor: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationImages:
    """Read and scale images until both splits are full.

    Raises :class:`InputError` for a file that is not an image, for images that have different sizes after the
    processor, and if a split is empty.
    """
    splits: dict[bool, list[F32]] = {False: [], True: []}
    want = {False: settings.samples, True: settings.heldout_samples}
    with listener.task("Reading images", min(len(files), sum(want.values())), "images") as task:
        for number, file in enumerate(files):
            held = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if len(splits[held]) < want[held]:
                image = open_image(file)
                try:
                    pixels = processor(images=[image], return_tensors="np")[PIXELS][0]
                except Exception as error:  # a processor's own code may raise anything
                    raise InputError(
                        f"The model's image processor does not accept {file} ({first_line(error)[:200]}): remove it."
                    ) from None
                splits[held].append(np.asarray(pixels, dtype=np.float32))
                task.advance(1)
            if all(len(splits[k]) >= want[k] for k in want):
                break
    if not all(splits.values()):
        raise InputError(
            f"{len(files)} images are too few: at least {HELD_OUT_EVERY} are needed, of which one is held out."
        )
    if any(len(splits[k]) < want[k] for k in want):
        listener.note(
            f"There are {len(splits[False])} calibration and {len(splits[True])} held-out images of the "
            f"{want[False]} and {want[True]} asked for; all are used."
        )
    shapes = {image.shape for split in splits.values() for image in split}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise InputError(
            f"The model's image processor gives images of different sizes ({one} and {other}), and a graph takes one "
            "size: give images of one shape."
        )
    return CalibrationImages(np.stack(splits[False]), np.stack(splits[True]))


def save_images(path: Path, images: CalibrationImages) -> None:
    """Write the scaled images, atomically."""
    save_tensors(path, FORMAT, vars(images))


def load_images(path: Path) -> CalibrationImages:
    """Read what :func:`save_images` wrote; raises :class:`InputError` for anything else."""
    return load_as(CalibrationImages, path, FORMAT, CALIBRATE_AGAIN)
