"""Compute the SHA-256 of files, each read once: what is found is kept in the output folder for the next command.

A file is taken to be unchanged if the system says the same of it: its inode, its size, and its times of modification
and of change (``ctime``), which no program sets. So a changed byte is seen also where the modification time was put
back, and a copy of a folder, whose files have other inodes, brings no digests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.files import open_data, read_json, sha256_of, write_json
from nbl_export.progress import Listener, Silent, bytes_task

_LONG = 1 << 30  # bytes of which the progress is shown


class Digests:
    """The SHA-256 of files, kept in the file ``kept``; with ``rehash`` nothing that is written there is believed.

    ``listener`` shows what takes long.
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
        """Hex SHA-256 of a regular file's bytes; raises the errors of :func:`nbl_export.files.open_data`."""
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
