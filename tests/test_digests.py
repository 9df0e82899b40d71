"""Each file is read once; whatever changed is read again, and nobody else's word is taken for it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import digests as module
from nbl_export.digests import Digests
from nbl_export.files import sha256_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read, in order."""
    names: list[str] = []

    def counted(stream: Any, done: Any = None) -> str:
        names.append(Path(f"/proc/self/fd/{stream.fileno()}").readlink().name)
        return sha256_of(stream, done)

    monkeypatch.setattr(module, "sha256_of", counted)
    return names


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept(tmp_path: Path) -> Path:
    return tmp_path / "digests.json"


def read_by_the_next(path: Path, tmp_path: Path, reads: list[str], **how: Any) -> bool:
    """Whether the next command reads the file; what it finds is right in any case."""
    before = len(reads)
    found = Digests(kept(tmp_path), **how)
    assert found.of(path) == digest_of(path)
    found.save()
    return len(reads) > before


def test_a_file_is_read_once_by_all_commands_and_once_more_with_rehash(
    file: Path, tmp_path: Path, reads: list[str]
) -> None:
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(3)] == [True, False, False]
    assert read_by_the_next(file, tmp_path, reads, rehash=True)
    found = Digests()
    assert {found.of(file) for _ in range(3)} == {digest_of(file)} and len(reads) == 3


def changed_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"W")


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"W" + path.read_bytes()[1:])
    other.replace(path)


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [changed_in_place, replaced, appended])
def test_a_changed_byte_is_seen_also_where_the_time_was_put_back(
    file: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    found = Digests(kept(tmp_path))
    before, times = found.of(file), file.stat()
    found.save()
    time.sleep(0.05)  # the clock of a file system ticks
    change(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert found.of(file) == Digests(kept(tmp_path)).of(file) == digest_of(file) != before


def test_a_file_that_is_written_while_it_is_read_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(stream: Any, done: Any = None) -> str:
        found = sha256_of(stream, done)
        time.sleep(0.05)
        changed_in_place(file)
        return found

    monkeypatch.setattr(module, "sha256_of", disturbed)
    found = Digests()
    assert found.of(file) != digest_of(file)
    monkeypatch.undo()
    assert found.of(file) == digest_of(file)


def test_a_copied_folder_brings_no_digests(file: Path, tmp_path: Path, reads: list[str]) -> None:
    read_by_the_next(file, tmp_path, reads)
    shutil.move(file, tmp_path / "moved")
    shutil.copy2(tmp_path / "moved", file)
    assert read_by_the_next(file, tmp_path, reads)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff", b"{"])
def test_a_damaged_file_is_ignored_and_written_anew(
    file: Path, tmp_path: Path, reads: list[str], content: bytes
) -> None:
    kept(tmp_path).write_bytes(content)
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, False]
