"""SHA-256 of files, each read once: kept for the length of a command, and in the output folder for those after it.

A file is taken to be unchanged if what the system says of it is the same: its device and inode, its size, and its times
of modification and of change (``ctime``).

1. Nothing but the system's clock sets the time of change: no program does, and no archive. A changed byte is seen also
   where the modification time was put back.
2. A file that is younger than the coarsest clock of a file system could change once more within the same tick: its
   digest is good for this command and is not written down, as git does not trust what is as young as its index.
3. A folder from somebody else brings no digests. A copy has other inodes and times of change; a whole file system,
   as on a stick, could have any. So what is written down is sealed with the number that the kernel draws at each
   start, which nobody elsewhere knows. After a restart, when devices may have other numbers too, files are read again;
   where there is no such number, by every command.
4. Places are written down as hashes with that number: a folder that is passed on says nothing of this machine.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nbl_export.errors import InputError
from nbl_export.files import (
    JSON_LIMIT,
    open_data,
    parse_json,
    read_bytes,
    sha256_of,
    sha256_of_json,
    write_json,
)
from nbl_export.progress import Listener, Silent, bytes_task

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_TICK = 2 * 10**9  # nanoseconds; FAT counts two seconds
_LONG = 1 << 30  # bytes of which the progress is shown
# Bytes. To read a larger file twice takes longer than to wait for the tick.
_WORTH_WAITING = 4 << 30
_MOST = 1 << 14  # files that are written down
# Size, time of modification, time of change, inode and device; the digest.
_Entry = tuple[tuple[int, ...], str]


class Digests:
    """The SHA-256 of files; those that last are written to the file ``kept``.

    With ``rehash`` no file is taken to be unchanged for what is written there. ``listener`` shows what takes long.
    """

    def __init__(
        self, kept: Path | None = None, rehash: bool = False, listener: Listener | None = None
    ) -> None:
        self._path, self._listener = kept, listener or Silent()
        self._key = _key()
        self._lasting = {} if rehash or not kept else _entries(kept, self._key)
        self._known: dict[str, _Entry] = {}
        self._new = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Digests, (self._path,)  # another process may be on another machine

    def of(self, path: Path) -> str:
        """Hex SHA-256 of a regular file's bytes; raises the errors of :func:`nbl_export.files.open_data`."""
        return self.of_all([path], f"Reading {path.name}")[path]

    def of_all(self, paths: Iterable[Path], title: str) -> dict[Path, str]:
        """The SHA-256 of each file; a task with the ``title`` shows how far it is if there is much to read."""
        found = {path: self._kept(path) for path in paths}
        missing = [path for path, digest in found.items() if digest is None]
        size = sum(path.stat().st_size for path in missing)
        with ExitStack() as within:
            done = within.enter_context(bytes_task(self._listener, title, size)) if size >= _LONG else None
            read = {path: self._read(path, done) for path in missing}
        return {path: digest or read[path] for path, digest in found.items()}

    def save(self) -> None:
        """Write down what lasts, if something new does. That it cannot be written costs time, and no result."""
        if not (self._path and self._key and self._new):
            return
        files = dict(list(self._lasting.items())[-_MOST:])
        with suppress(OSError):
            write_json(self._path, {"files": files, "seal": _seal(files, self._key)})
            self._new = False

    def _kept(self, path: Path) -> str | None:
        # A server tells an opened file's facts as they are now, a closed one's as they were a while ago.
        with open_data(path) as file:
            facts = _facts(file)
        place = self._place(path)
        entries = (table[place] for table in (self._known, self._lasting) if place in table)
        return next((digest for known, digest in entries if known == facts), None)

    def _read(self, path: Path, done: Callable[[int], None] | None) -> str:
        with open_data(path) as file:
            _wait_for_the_tick(file)
            facts, settled = _facts(file), _age(file) > _TICK
            digest = sha256_of(file, done)
            if _facts(file) == facts:  # otherwise it is being written
                place = self._place(path)
                self._known[place] = facts, digest
                if settled:
                    self._lasting.pop(place, None)  # the newest are the last
                    self._lasting[place] = facts, digest
                    self._new = True
        return digest

    def _place(self, path: Path) -> str:
        return hmac.digest(
            self._key, os.path.realpath(path).encode("utf-8", "surrogateescape"), "sha256"
        ).hex()


class Unread(Digests):
    """Reads nothing: of each file the digest is empty, for whoever asks what a model is and not which one."""

    def of_all(self, paths: Iterable[Path], title: str) -> dict[Path, str]:
        return dict.fromkeys(paths, "")


def _facts(file: BinaryIO) -> tuple[int, ...]:
    s = os.fstat(file.fileno())
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def _age(file: BinaryIO) -> int:
    """Nanoseconds since the file was changed, by the clock of this machine."""
    return time.time_ns() - os.fstat(file.fileno()).st_ctime_ns


def _wait_for_the_tick(file: BinaryIO) -> None:
    left = _TICK - _age(file)
    if os.fstat(file.fileno()).st_size >= _WORTH_WAITING and 0 <= left <= _TICK:
        time.sleep(left / 1e9 + 0.01)


def _key() -> bytes:
    """The number of this machine's start; empty where there is none."""
    try:
        return _BOOT.read_bytes().strip()
    except OSError:
        return b""


def _seal(files: Mapping[str, Any], key: bytes) -> str:
    return hmac.digest(key, sha256_of_json(files).encode(), "sha256").hex()


def _entries(path: Path, key: bytes) -> dict[str, _Entry]:
    """What :meth:`Digests.save` wrote since this machine was started; nothing for any other file."""
    try:
        value = parse_json(read_bytes(path, JSON_LIMIT))
        files = value["files"]
        if not key or not hmac.compare_digest(str(value["seal"]).encode(), _seal(files, key).encode()):
            return {}
        return {place: (tuple(facts), digest) for place, (facts, digest) in files.items()}
    except (InputError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
