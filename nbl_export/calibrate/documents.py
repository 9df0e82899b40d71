"""Documents of calibration text: files, folders, patterns, Hub data sets.

What is read may have been made to hurt, so there are limits: of how much a packed file may unpack to, of the length of
a line, and of lines without text.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import importlib
import io
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from nbl_export.errors import InputError
from nbl_export.files import open_data, parse_json, user_path
from nbl_export.packages import missing

_FORMATS = (".txt", ".jsonl", ".parquet")
# A plain text file is cut at line ends into documents of about this many characters, so that some of them can be
# held out.
_TXT_DOCUMENT = 8192
# Characters of a line.
_LINE = 1 << 26
_ROWS = 16  # of a Parquet file at a time
_EMPTY_LINES = 5_000_000  # in a row
# A packed text is a third to a fifth of its size. What unpacks to so many times of it, and to so many bytes, is a bomb.
_RATIO, _UNPACKED = 200, 1 << 24


def _zstd() -> Any:
    # The standard library's module (Python 3.14), or its backport: both detect a truncated file.
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


BROKEN_ARCHIVE: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
if (_module := _zstd()) is not None:
    BROKEN_ARCHIVE += (_module.ZstdError,)


def field_of(row: Any, field: str, where: str, _folder: Path | None = None) -> str:
    """The text of a row; raises :class:`InputError`, which names ``where`` it stands, if it has none."""
    if isinstance(row, dict) and isinstance(row.get(field, 0), str | None):
        return row[field] or ""  # an empty cell is a document without text, which packing skips
    names = [k for k, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
    raise InputError(_no_field(field, names, where))


def documents(
    sources: Iterable[str], field: str, read: Callable[[Any, str, str, Path | None], Any] = field_of
) -> Iterator[Any]:
    """The documents of all ``sources`` in order: files, folders, glob patterns or Hub data-set ids.

    ``read`` makes the document of a row, from the field of its text, where it stands, and the folder of a .jsonl file;
    it is the text alone unless something else is wanted.

    Raises :class:`InputError` for an unknown format, a file that is not text, or a missing field.
    """
    for source in sources:
        files = local_files(source)
        if files is None:
            yield from _hub_documents(source, field)
        for file in files or ():
            yield from _file_documents(file, field, read)


def local_files(source: str) -> list[Path] | None:
    """The files of a local source, in order; None for a source that must be a Hub data set.

    Raises :class:`InputError` for a path, folder or pattern without files.
    """
    path = user_path(source, "The calibration text")
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _format(p) is not None and not p.is_dir())
        if odd := next((p for p in found if not p.is_file()), None):
            raise InputError(f"{odd} is not a regular file: remove it from the calibration text.")
        if not found:
            raise InputError(f"The folder {source} has no calibration text: no {_listed()} file in it.")
        return found
    if any(c in source for c in "*?["):
        # Path.glob takes no absolute patterns.
        matches = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())  # noqa: PTH207
        if not matches:
            raise InputError(f"No file matches the calibration text {source}: check the pattern.")
        return matches
    if os.path.lexists(path):
        raise InputError(f"The calibration text {source} is not a regular file: give a file or a folder.")
    check_there(source)
    return None


def check_there(source: str) -> None:
    """Refuse a ``source`` that does not exist and, since it reads like a path, is no Hub data set."""
    path = user_path(source, "The calibration text")
    if os.path.lexists(path) or any(c in source for c in "*?["):
        return
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or _format(path) is not None:
        raise InputError(f"The calibration text {source} does not exist: check the path.")


def check_readable(
    sources: Iterable[str], field: str, read: Callable[[Any, str, str, Path | None], Any] = field_of
) -> None:
    """Refuse, before any work, sources that are not there or cannot be read, as far as the first document shows.

    Raises the errors of :func:`documents`; nothing is said of Hub data sets.
    """
    for source in sources:
        files = local_files(source)
        for file in files or ():
            _check_format(file)
            if not os.access(file, os.R_OK):
                raise InputError(
                    f"The calibration text {file} cannot be read: give a file that you may read."
                )
        if files:
            next(documents([str(files[0])], field, read), None)


def _format(path: Path) -> str | None:
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    found = next((suffix for suffix in _FORMATS if plain.endswith(suffix)), None)
    # Parquet is compressed internally; a compressed Parquet file cannot be read in chunks.
    return None if found == ".parquet" and plain != name else found


def _check_format(path: Path) -> str:
    kind = _format(path)
    if kind is None:
        raise InputError(f"{path} is not a calibration text: give a {_listed()} file.")
    return kind


def _listed() -> str:
    return f"{', '.join(_FORMATS[:-1])} (.gz and .zst too) or {_FORMATS[-1]}"


def _file_documents(path: Path, field: str, read: Callable[..., Any]) -> Iterator[Any]:
    kind = _check_format(path)
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path, field)
            return
        with open_packed(path) as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="strict", newline="\n")
            yield from (
                _jsonl_documents(path, lines_of(path, text), field, read)
                if kind == ".jsonl"
                else _txt_documents(path, text)
            )
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start} of a block): convert it."
        ) from None
    except BROKEN_ARCHIVE as error:
        raise InputError(f"{path} cannot be unpacked ({error}): download it again.") from None


def open_packed(path: Path) -> Any:
    """A regular file to read the bytes of, unpacked if it is packed; a bomb is an :class:`InputError`."""
    suffix = path.suffix.lower()
    file = open_data(path)
    if suffix == ".gz":
        return io.BufferedReader(_Unpacked(path, file, gzip.open(file, "rb")))
    if suffix == ".zst":
        zstd = _zstd()
        if zstd is None:
            file.close()
            raise missing("backports.zstd", "Reading .zst")
        return io.BufferedReader(_Unpacked(path, file, zstd.open(file, "rb")))
    return file


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file, as long as they are not too many for its size."""

    def __init__(self, path: Path, packed: BinaryIO, unpacked: Any) -> None:
        self._path, self._packed, self._unpacked = path, packed, unpacked
        self._most = max(_UNPACKED, _RATIO * path.stat().st_size)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._unpacked.read(len(buffer))
        self._read += len(block)
        if self._read > self._most:
            raise InputError(
                f"{self._path} unpacks to more than {_RATIO} times its size and {_UNPACKED >> 20} MiB, which no text "
                "does: give another file, or unpack it."
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._unpacked.close()
            self._packed.close()
        super().close()


def lines_of(path: Path, text: IO[str]) -> Iterator[str]:
    """The lines of an open text; one that is too long is an :class:`InputError`, as are too many without text."""
    empty = 0
    for number in itertools.count(1):
        line = text.readline(_LINE + 1)
        if not line:
            return
        if len(line) > _LINE:
            raise InputError(
                f"{path}, line {number}: longer than {_LINE >> 20} MiB, the limit of a line: cut it into documents."
            )
        empty = 0 if line.strip() else empty + 1
        if empty > _EMPTY_LINES:
            raise InputError(f"{path} has {_EMPTY_LINES:,} lines without text in a row: give another file.")
        yield line


def _txt_documents(path: Path, text: IO[str]) -> Iterator[str]:
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


def _jsonl_documents(path: Path, lines: Iterable[str], field: str, read: Callable[..., Any]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            # The message of an encoding error would quote the line.
            odd = isinstance(error, UnicodeError)
            reason = (
                "half of a surrogate pair" if odd else getattr(error, "msg", str(error).partition(";")[0])
            )
            raise InputError(
                f"{path}, line {number}: not JSON ({reason}); a .jsonl file needs one object per line."
            ) from None
        yield read(row, field, f"{path}, line {number}", path.parent)


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing("pyarrow", "Reading .parquet") from None
    try:
        with open_data(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            columns = list(file.schema_arrow)
        # Lists and structs have no text of their own, and cannot be read as a dictionary.
        nested = {c.name for c in columns if pyarrow.types.is_nested(getattr(c.type, "storage_type", c.type))}
        names = [c.name for c in columns if c.name not in nested]
        if field not in names:
            raise InputError(_no_field(field, names, str(path)))
        # As a dictionary, a text that is repeated a thousand times takes its memory once.
        with open_data(path) as opened, pyarrow.parquet.ParquetFile(opened, read_dictionary=[field]) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                column = batch.column(0)
                if _longest(column) > _LINE:
                    raise InputError(
                        f"{path} has a text of more than {_LINE >> 20} MiB: cut it into documents."
                    )
                for cell in column:
                    yield field_of({field: cell.as_py()}, field, str(path))
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise InputError(
            f"{path} is not a parquet file ({(str(error) or type(error).__name__).splitlines()[0]}): download it again."
        ) from None


def _longest(column: Any) -> int:
    """Bytes of the longest text of an array, which may be encoded as a dictionary; 0 if it holds no text."""
    import pyarrow.compute

    texts = getattr(column, "dictionary", column)
    try:
        return pyarrow.compute.max(pyarrow.compute.binary_length(texts)).as_py() or 0
    except pyarrow.ArrowNotImplementedError:  # numbers, lists: refused row by row
        return 0


def _hub_documents(name: str, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise missing(
            "datasets", f"{name} is not a local file; to read it from the Hub: A Hub data set"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            yield field_of(row, field, f"data set {name}")
    except InputError:
        raise
    except Exception as error:  # the Hub client raises its own, httpx's and OS errors
        raise InputError(
            f"The calibration text {name} is neither a local file or folder nor a data set that can be read from "
            f"the Hub ({type(error).__name__}): check the spelling and the network."
        ) from None


def _no_field(field: str, names: Iterable[str], where: str) -> str:
    has = ", ".join(names) or "none"
    return f"{where}: no text field {field!r} (text fields: {has}); name it with --text-field."
