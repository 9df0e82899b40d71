"""Text for calibration, selection and held-out evaluation: files, folders, Hub data sets, or the model itself.

A source is a stream of documents. Of every eight documents, one is held out to measure the method's loss: neither
the fit nor the choice of layers uses it. One is for selection: the cost of replacing layers is measured on it. Six are
for calibration. Documents are tokenized, joined with the end-of-text token and cut into rows of ``seq_len`` tokens,
as in the paper's code.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.tensorfile import load_as, save_tensors

I32 = NDArray[np.int32]
HELD_OUT_EVERY = 8
FORMAT = "nbl-export/text/2"
CALIBRATION, SELECTION, HELDOUT = "calibration", "selection", "held-out"
# The selection and held-out documents of every HELD_OUT_EVERY; the others are for calibration.
_SPLIT_AT = {HELD_OUT_EVERY // 2 - 1: SELECTION, HELD_OUT_EVERY - 1: HELDOUT}
_FORMATS = (".txt", ".jsonl", ".parquet")
# A plain text file is cut at line ends into documents of about this many characters, so that some of them can be
# held out.
_TXT_DOCUMENT = 8192


def _zstd() -> Any:
    # The standard library's module (Python 3.14), or its backport: both detect a truncated file.
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


BROKEN_ARCHIVE: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
if (_module := _zstd()) is not None:
    BROKEN_ARCHIVE += (_module.ZstdError,)


@dataclass(frozen=True)
class CalibrationText:
    """Token ids, packed.

    ``calibration`` is [samples, seq_len]; ``selection`` and ``heldout`` are [rows, seq_len] of documents that are in
    no other split. ``…_document`` is the document number of each of their tokens, -1 for padding. ``start`` [n] are
    the tokens at the start of a prompt. All are int32. An encoder's ``selection`` has no rows.
    """

    calibration: I32
    selection: I32
    selection_document: I32
    heldout: I32
    heldout_document: I32
    start: I32

    def prompt(self, tokens: I32) -> I32:
        """``tokens`` as a prompt, with the start tokens first."""
        return np.concatenate([self.start, tokens])


# documents ---------------------------------------------------------------------------------------


def documents(sources: Iterable[str], field: str) -> Iterator[str]:
    """The documents of all ``sources`` in order: files, folders, glob patterns or Hub data-set ids.

    Raises :class:`InputError` for an unknown format, a file that is not text, or a missing field.
    """
    for source in sources:
        files = local_files(source)
        if files is None:
            yield from _hub_documents(source, field)
        for file in files or ():
            yield from _file_documents(file, field)


def local_files(source: str) -> list[Path] | None:
    """The files of a local source, in order; None for a source that must be a Hub data set.

    Raises :class:`InputError` for a path, folder or pattern without files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _format(p) is not None)
        if not found:
            raise InputError(f"The folder {source} has no calibration text: no {_listed()} file in it.")
        return found
    if any(c in source for c in "*?["):
        # Path.glob takes no absolute patterns.
        matches = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())  # noqa: PTH207
        if not matches:
            raise InputError(f"No file matches the calibration text {source}: check the pattern.")
        return matches
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or _format(path) is not None:
        raise InputError(f"The calibration text {source} does not exist: check the path.")
    return None


def _format(path: Path) -> str | None:
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    found = next((suffix for suffix in _FORMATS if plain.endswith(suffix)), None)
    # Parquet is compressed internally; a compressed Parquet file cannot be read in chunks.
    return None if found == ".parquet" and plain != name else found


def _listed() -> str:
    return f"{', '.join(_FORMATS[:-1])} (.gz and .zst too) or {_FORMATS[-1]}"


def _file_documents(path: Path, field: str) -> Iterator[str]:
    kind = _format(path)
    if kind is None:
        raise InputError(f"{path} is not a calibration text: give a {_listed()} file.")
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path, field)
            return
        with open_packed(path) as raw:
            lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="strict", newline="\n")
            yield from (
                _jsonl_documents(path, lines, field) if kind == ".jsonl" else _txt_documents(path, lines)
            )
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start} of a block): convert it."
        ) from None
    except BROKEN_ARCHIVE as error:
        raise InputError(f"{path} cannot be unpacked ({error}): download it again.") from None


def open_packed(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        zstd = _zstd()
        if zstd is None:
            raise MissingDependencyError(_needs("backports.zstd", "Reading .zst", "text"))
        return zstd.open(path, "rb")
    return path.open("rb")


def _txt_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    document: list[str] = []
    size = 0
    for line in lines:
        if "\0" in line:
            raise InputError(f"{path} is not text: it has NUL bytes; give another file.")
        # A text without line ends is cut at any character.
        for start in range(0, len(line), _TXT_DOCUMENT):
            piece = line[start : start + _TXT_DOCUMENT]
            document.append(piece)
            size += len(piece)
            if size >= _TXT_DOCUMENT:
                yield "".join(document)
                document, size = [], 0
    if document:
        yield "".join(document)


def _jsonl_documents(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise InputError(
                f"{path}, line {number}: not JSON ({reason}); a .jsonl file needs one object per line."
            ) from None
        yield _field(row, field, f"{path}, line {number}")


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(_needs("pyarrow", "Reading .parquet", "text")) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise InputError(_no_field(field, file.schema_arrow.names, str(path)))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _field({field: value}, field, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is not a parquet file ({str(error).splitlines()[0]}): download it again."
        ) from None


def _hub_documents(name: str, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{name} is not a local file; to read it from the Hub: "
            + _needs("datasets", "A Hub data set", "hub")
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            yield _field(row, field, f"data set {name}")
    except InputError:
        raise
    except Exception as error:  # the Hub client raises its own, httpx's and OS errors
        raise InputError(
            f"The calibration text {name} is neither a local file or folder nor a data set that can be read from "
            f"the Hub ({type(error).__name__}): check the spelling and the network."
        ) from None


def _field(row: Any, field: str, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get(field, 0), str | None):
        return row[field] or ""  # an empty cell is a document without text, which packing skips
    names = [k for k, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
    raise InputError(_no_field(field, names, where))


def _no_field(field: str, names: Iterable[str], where: str) -> str:
    has = ", ".join(names) or "none"
    return f"{where}: no text field {field!r} (text fields: {has}); name it with --text-field."


def _needs(package: str, what: str, extra: str) -> str:
    return f"{what} needs {package}: pip install 'nbl-export[{extra}]'."


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
    end = end_token(tokenizer)
    length = settings.seq_len
    want = {split: rows * length for split, rows in rows_by_split(settings).items()}
    tokens: dict[str, list[I32]] = {split: [] for split in want}
    owners: dict[str, list[I32]] = {split: [] for split in want}
    have = dict.fromkeys(want, 0)
    with listener.task("Reading text", sum(want.values()), "tokens") as task:
        for number, text in enumerate(t for t in texts if t.strip()):
            split = split_of(number)
            if have[split] < want[split]:
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                row = np.array([*ids, end], dtype=np.int32)[: want[split] - have[split]]
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


def end_token(tokenizer: Any) -> int:
    """The token that separates packed documents: end of text, else padding, else 0."""
    known = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((int(t) for t in known if t is not None), 0)


def frame_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after a text, found by tokenizing one letter."""
    framed, plain = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (True, False)
    )
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), len(framed))
    return framed[:at], framed[at + len(plain) :]


def start_tokens(tokenizer: Any) -> I32:
    """The tokens at the start of a prompt: by the tokenizer's own rules, else its beginning-of-text token.

    [n] int32; n is 0 for a tokenizer with neither.
    """
    own, _ = frame_tokens(tokenizer)
    if not own and tokenizer.bos_token_id is not None:
        own = [tokenizer.bos_token_id]
    return np.array(own, dtype=np.int32)


# on disk -----------------------------------------------------------------------------------------


def save_text(path: Path, text: CalibrationText) -> None:
    """Write the packed tokens, atomically."""
    save_tensors(path, FORMAT, {name: getattr(text, name) for name in CalibrationText.__annotations__})


def load_text(path: Path) -> CalibrationText:
    """Read what :func:`save_text` wrote; raises :class:`InputError` for anything else."""
    return load_as(CalibrationText, path, FORMAT, CALIBRATE_AGAIN)
