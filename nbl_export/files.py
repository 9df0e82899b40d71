"""Read and write files: atomic and durable writes, hashes, JSON, and names that stay inside their folder.

What is read here may come from somebody else. JSON is read only up to :data:`JSON_LIMIT`, and a name that a file gives
is turned into a path by :func:`member` and nowhere else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any
from uuid import uuid4

from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.packages import check_system
from nbl_export.progress import Listener, Silent, bytes_task

# Marks an unfinished file or folder of nbl-export; a leftover may be deleted.
TEMPORARY = ".nbl.tmp"
# Bytes. The largest JSON file that we read is a model's list of weights: a few MB for a thousand billion parameters.
JSON_LIMIT = 1 << 26
_TOML_LIMIT = 1 << 20  # bytes of a file of settings
_SEAL = "sha256"
_LONG = 1 << 30  # bytes whose reading is shown
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_data(path: Path) -> BufferedReader:
    """Open a regular file to read bytes; anything else (a FIFO, a device) is an :class:`InputError`.

    Raises ``OSError`` as ``open`` does.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file: give a file.")
    return path.open("rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; raises :class:`InputError` for a larger one."""
    with open_data(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(
            f"{path} is larger than {limit / 2**20:,.0f} MiB, the limit for such a file: check what it is."
        )
    return content


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a regular file's bytes, streamed."""
    with open_data(path) as file:
        return sha256_of(file)


def sha256_of(file: BufferedReader) -> str:
    """Hex SHA-256 of the rest of a file, streamed."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write to; it becomes ``path`` only if the block succeeds.

    The bytes are on the disk before the name is, so that not even a power cut leaves half a file under it.
    """
    # One folder, and not those above it: an output folder that was deleted meanwhile is not made anew.
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}{TEMPORARY}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file to ``path``, durably: its bytes first, then its name."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot do it for a folder; a full disk is an error.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path``, made if needed and never written to, within the block; a link is none.

    Raises :class:`InputError` with the sentence ``busy`` if another process holds it. Who holds it may delete it.
    """
    check_system()
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(busy) from None
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any, finite: bool = True) -> str:
    """The text of a JSON file; NaN and infinity, which JSON cannot represent, are refused if it is to be ``finite``."""
    return json.dumps(value, indent=2, allow_nan=not finite, ensure_ascii=False) + "\n"


def jsonable(value: Any) -> Any:
    """``value`` as JSON has it: a dataclass is an object of its fields, and text is what JSON cannot represent.

    That is ``"nan"``, ``"inf"``, ``"-inf"``, a block (``"7.mlp"``), a path.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: jsonable(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (Mlp, Span, Path)) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(value))


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Read a JSON file of at most :data:`JSON_LIMIT` bytes; an unreadable one is an :class:`InputError`.

    The sentence names ``what`` and the ``remedy``.
    """
    try:
        return parse_json(read_bytes(path, JSON_LIMIT))
    except FileNotFoundError:
        raise InputError(f"{what} is missing ({path}): {remedy}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{what} is damaged ({path}: {error}): {remedy}.") from None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own SHA-256, for results that are kept between runs: :func:`read_sealed`."""
    write_json(path, {**value, _SEAL: sha256_of_json(dict(value))})


def read_sealed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object of :func:`write_sealed`; raises :class:`InputError` if anything in it was changed since."""
    value = read_json(path, what, remedy)
    if not isinstance(value, dict) or value.pop(_SEAL, None) != sha256_of_json(value):
        raise InputError(f"{what} was changed after it was written ({path}): {remedy}.")
    return value


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text in UTF-8; raises ``ValueError`` for anything else.

    That includes strings that are no Unicode text (one half of a surrogate pair), which could not be written again.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a UnicodeEncodeError is a ValueError
    return value


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises ``ValueError`` or ``RecursionError`` for one that is not TOML."""
    return tomllib.loads(read_bytes(path, _TOML_LIMIT).decode("utf-8"))


def printable(text: str) -> str:
    """``text`` on one line, with every character that a terminal obeys, or that is no character, as U+FFFD."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def printable_lines(text: str) -> str:
    """``text`` with its lines, each as :func:`printable` has it; a tab is four spaces, other white space is one."""
    return "".join(
        "\n" if c == "\n" else "    " if c == "\t" else " " if c.isspace() else printable(c) for c in text
    )


def member(folder: Path, name: object, what: str) -> Path:
    """The path of the file ``name`` in ``folder``; the name comes from a file that somebody else may have written.

    Raises :class:`InputError`, which calls the name ``what``, for anything that is not a relative path below the
    folder: an absolute path, ``..``, an empty name, a name that no system takes, or a link that leaves the folder.
    """
    if isinstance(name, str) and Path(name).parts and not {"\0", "\\", ":"} & set(name):
        path = folder / name
        if ".." not in path.parts[len(folder.parts) :] and stays_in(folder.resolve(), path.resolve()):
            return path
    raise InputError(
        f"{what} is {name!r}, which is not the name of a file in {folder}: get this folder again."
    )


def user_path(text: str, what: str) -> Path:
    """The path that a user wrote, with ``~`` for their home folder; a file may well be called ``~m``.

    Raises :class:`InputError`, which begins with ``what``, for a path that cannot be recorded: one that is not UTF-8.
    """
    path = Path(os.path.expanduser(text))  # noqa: PTH111, since Path's own refuses an unknown user
    try:
        str(Path.cwd() / path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} {text} lies at a path that is not UTF-8 text: rename it.") from None
    return path


def sweep(folder: Path) -> None:
    """Delete what a killed process has left unfinished in ``folder``; whoever calls it holds the folder's lock."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def overlap(one: Path, other: Path) -> str | None:
    """How the folder ``one`` and the file or folder ``other`` share files: it "is", "holds" or "lies in" the other."""
    here, there = one.resolve(), other.resolve()
    if here == there:
        return "is"
    if there.is_relative_to(here):
        return "holds"
    return "lies in" if here.is_relative_to(there) else None


def stays_in(folder: Path, target: Path) -> bool:
    """Whether the resolved path ``target`` is inside the resolved ``folder`` or its Hugging Face cache blobs."""
    # The Hugging Face cache links models--OWNER--NAME/snapshots/REVISION/… to models--OWNER--NAME/blobs.
    snapshots = [p for p in folder.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    blobs = [snapshots[0].parent / "blobs"] if snapshots else []
    return any(target.is_relative_to(root) for root in (folder, *blobs))


# digests that are kept ----------------------------------------------------------------------------


class Digests:
    """The SHA-256 of files, each read once: they are kept in the file ``kept``; with ``rehash`` it is not believed.

    A file is taken to be unchanged if the system says the same of it: its inode, its size, and its times of
    modification and of change (``ctime``), which no program sets. So a changed byte is seen also where the modification
    time was put back, and a copy of a folder, whose files have other inodes, brings no digests. ``listener`` shows what
    takes long.
    """

    def __init__(
        self, kept: Path | None = None, rehash: bool = False, listener: Listener | None = None
    ) -> None:
        self._path, self._listener, self._saved = kept, listener or Silent(), True
        self._known: dict[str, list[Any]] = {}
        if kept and not rehash:
            with suppress(InputError, TypeError, ValueError):  # there is none, or it is damaged
                self._known = dict(read_json(kept, "The digests", "they are computed anew"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Digests, (self._path,)  # another process may be on another machine

    def of(self, path: Path) -> str:
        """Hex SHA-256 of a regular file's bytes; raises the errors of :func:`open_data`."""
        return self.of_all([path], f"Reading {path.name}")[path]

    def of_all(self, paths: Iterable[Path], title: str) -> dict[Path, str]:
        """The SHA-256 of each file; a task with the ``title`` shows how far it is if there is much to read."""
        found: dict[Path, str] = {}
        missing: dict[Path, int] = {}
        for path in paths:
            with open_data(path) as file:
                facts, known = _facts(file), self._known.get(os.path.realpath(path), [""])
            if known[:-1] == facts:
                found[path] = known[-1]
            else:
                missing[path] = facts[0]
        size = sum(missing.values())
        with bytes_task(self._listener, title, size) if size >= _LONG else nullcontext() as done:
            for path, length in missing.items():
                with open_data(path) as file:
                    facts = _facts(file)
                    found[path] = sha256_of(file)
                    if _facts(file) == facts:  # otherwise it is being written
                        self._known[os.path.realpath(path)] = [*facts, found[path]]
                        self._saved = False
                if done:
                    done(length)
        return found

    def save(self) -> None:
        """Write down what is known of files that are there; that it cannot be written costs time, and no result."""
        if self._path and not self._saved:
            with suppress(OSError, ValueError):  # a name that is no text
                write_json(
                    self._path, {place: one for place, one in self._known.items() if Path(place).exists()}
                )
                self._saved = True


class Unread(Digests):
    """Reads nothing: of each file the digest is empty, for whoever asks what a model is and not which one."""

    def of_all(self, paths: Iterable[Path], title: str) -> dict[Path, str]:
        return dict.fromkeys(paths, "")


def _facts(file: BufferedReader) -> list[int]:
    # A server tells an opened file's facts as they are now, a closed one's as they were a while ago.
    s = os.fstat(file.fileno())
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]
