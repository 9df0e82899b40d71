"""Each file is read once; whatever changed is read again, and nobody else's word is taken for it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import digests as module
from nbl_export.digests import Digests
from nbl_export.errors import InputError
from nbl_export.files import sha256_of, sha256_of_json
from tests.listening import Notes


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


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Called with seconds: puts the clock of this process forward, that of the file system stays."""
    now = module.time.time_ns

    def forward(seconds: float) -> None:
        monkeypatch.setattr(module.time, "time_ns", lambda: now() + int(seconds * 1e9))

    return forward


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


def test_a_file_is_read_once_by_a_command(file: Path, reads: list[str]) -> None:
    found = Digests()
    assert {found.of(file) for _ in range(3)} == {digest_of(file)}
    assert reads == [file.name]


@pytest.mark.parametrize("name", ["weights.safetensors", "ü\udcff"])
def test_a_file_is_read_once_by_all_commands(
    file: Path, tmp_path: Path, reads: list[str], later: Any, name: str
) -> None:
    path = file.rename(tmp_path / name)
    later(3)
    assert [read_by_the_next(path, tmp_path, reads) for _ in range(3)] == [True, False, False]


def test_rehash_reads_once_more(file: Path, tmp_path: Path, reads: list[str], later: Any) -> None:
    later(3)
    read_by_the_next(file, tmp_path, reads)
    assert read_by_the_next(file, tmp_path, reads, rehash=True)
    assert not read_by_the_next(file, tmp_path, reads)


def test_a_young_file_is_read_again_by_the_next_command(
    file: Path, tmp_path: Path, reads: list[str], later: Any
) -> None:
    """One that is changed within the tick of the clock has the same times as before."""
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, True]
    assert not kept(tmp_path).exists()
    later(1.5)
    assert read_by_the_next(file, tmp_path, reads) and read_by_the_next(file, tmp_path, reads)
    later(-3600)  # the clock was put back since it was written
    assert read_by_the_next(file, tmp_path, reads) and read_by_the_next(file, tmp_path, reads)
    later(3)
    assert read_by_the_next(file, tmp_path, reads) and not read_by_the_next(file, tmp_path, reads)


def test_a_large_young_file_waits_for_the_tick_and_is_read_once(
    file: Path, tmp_path: Path, reads: list[str], later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        later(seconds)

    monkeypatch.setattr(module, "_WORTH_WAITING", 10)
    monkeypatch.setattr(module.time, "sleep", sleep)
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, False]
    assert len(waited) == 1 and 0 < waited[0] < 2.1


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
@pytest.mark.parametrize("by", ["the same command", "the next command"])
def test_a_changed_byte_is_seen_also_where_the_time_was_put_back(
    file: Path, tmp_path: Path, reads: list[str], later: Any, change: Callable[[Path], None], by: str
) -> None:
    later(3)
    found = Digests(kept(tmp_path))
    before, times = found.of(file), file.stat()
    found.save()
    assert not read_by_the_next(file, tmp_path, reads)
    change(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    after = (found if by == "the same command" else Digests(kept(tmp_path))).of(file)
    assert after == digest_of(file) != before


def test_a_file_that_is_written_while_it_is_read_is_read_again(
    file: Path, tmp_path: Path, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    later(3)

    def disturbed(stream: Any, done: Any = None) -> str:
        found = sha256_of(stream, done)
        changed_in_place(file)
        return found

    monkeypatch.setattr(module, "sha256_of", disturbed)
    found = Digests(kept(tmp_path))
    assert found.of(file) != digest_of(file)
    monkeypatch.undo()
    assert found.of(file) == digest_of(file)
    assert not kept(tmp_path).exists()


def test_files_of_one_content_are_told_apart_by_their_place(
    file: Path, tmp_path: Path, reads: list[str], later: Any
) -> None:
    other = tmp_path / "hard link"
    other.hardlink_to(file)
    later(3)
    found = Digests(kept(tmp_path))
    title = "Reading"
    assert found.of_all([file, other, file], title) == {file: digest_of(file), other: digest_of(file)}
    assert sorted(reads) == sorted([file.name, other.name])


@pytest.mark.parametrize("kind", ["fifo", "folder", "nothing"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises((InputError, OSError)):
        Digests().of(path)


# what is written down ------------------------------------------------------------------------------


@pytest.fixture
def written(file: Path, tmp_path: Path, later: Any) -> Path:
    """The digests of ``file``, written down."""
    later(3)
    found = Digests(kept(tmp_path))
    found.of(file)
    found.save()
    return kept(tmp_path)


def test_it_says_nothing_of_this_machine(written: Path, file: Path, tmp_path: Path) -> None:
    text = written.read_text()
    boot = module._BOOT.read_text().strip()
    for secret in (str(tmp_path), file.name, boot, hashlib.sha256(str(file).encode()).hexdigest()):
        assert secret not in text


def test_a_copied_folder_brings_no_digests(
    written: Path, file: Path, tmp_path: Path, reads: list[str]
) -> None:
    """Not even where the copy lies at the same path, with the same times, and nothing else is different."""
    before = tmp_path.with_name(f"{tmp_path.name}-before")
    tmp_path.rename(before)
    shutil.copytree(before, tmp_path, copy_function=shutil.copy2)
    changed_in_place(file)
    os.utime(file, ns=(0, (before / file.name).stat().st_mtime_ns))
    assert read_by_the_next(file, tmp_path, reads)


def forged(written: Path, file: Path, key: bytes) -> None:
    """Write down, for ``file`` as it is now, the digest of other bytes, sealed with ``key``."""
    value = json.loads(written.read_text())
    s = file.stat()
    facts = [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]
    (place,) = value["files"]
    mine = hmac.digest(key, os.fsencode(os.path.realpath(file)), "sha256").hex()
    files = {place: [facts, "0" * 64], mine: [facts, "0" * 64]}
    seal = hmac.digest(key, sha256_of_json(files).encode(), "sha256").hex()
    written.write_text(json.dumps({"files": files, "seal": seal}))


def test_a_forged_file_is_not_believed_even_where_it_knows_inode_and_times(
    written: Path, file: Path, tmp_path: Path, reads: list[str]
) -> None:
    for key in (b"", b"00000000-0000-0000-0000-000000000000"):
        forged(written, file, key)
        assert read_by_the_next(file, tmp_path, reads, rehash=False)


def test_the_forgery_would_work_with_the_key_of_this_machine(written: Path, file: Path) -> None:
    """Otherwise the test before would show nothing."""
    forged(written, file, module._BOOT.read_bytes().strip())
    assert Digests(written).of(file) == "0" * 64


def test_after_a_restart_files_are_read_again(
    written: Path, file: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boot").write_text("another number\n")
    monkeypatch.setattr(module, "_BOOT", tmp_path / "boot")
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, False]


def test_a_machine_without_a_number_keeps_them_for_one_command(
    written: Path, file: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written.read_bytes()
    monkeypatch.setattr(module, "_BOOT", tmp_path / "nowhere")
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, True]
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"files": {}}',
        b'{"files": [], "seal": ""}',
        b'{"files": {"a": 3}, "seal": 5}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_ignored_and_written_anew(
    written: Path, file: Path, tmp_path: Path, reads: list[str], content: bytes
) -> None:
    written.write_bytes(content)
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_stands_in_its_place_harms_nothing(
    file: Path, tmp_path: Path, reads: list[str], later: Any, kind: str
) -> None:
    later(3)
    place, victim = kept(tmp_path), tmp_path / "victim"
    victim.write_text("somebody's")
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        (place / "inside").mkdir(parents=True)
    else:
        place.symlink_to(victim)
    assert read_by_the_next(file, tmp_path, reads)
    assert victim.read_text() == "somebody's"
    assert read_by_the_next(file, tmp_path, reads) == (kind == "folder")


def test_another_process_knows_only_what_is_written_down(
    written: Path, file: Path, tmp_path: Path, reads: list[str]
) -> None:
    listener: Any = (None for _ in ())  # which cannot be sent
    found = Digests(written, listener=listener)
    other = file.with_name("other")
    other.write_text("other")
    found.of(other)
    sent = pickle.loads(pickle.dumps(found))
    reads.clear()
    assert (sent.of(file), sent.of(other)) == (digest_of(file), digest_of(other)) and reads == ["other"]


def test_it_does_not_grow_without_end(
    tmp_path: Path, reads: list[str], later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_text(path.name)
    later(3)
    for path in paths:
        read_by_the_next(path, tmp_path, reads)
    assert len(json.loads(kept(tmp_path).read_text())["files"]) == 3
    assert [read_by_the_next(path, tmp_path, reads) for path in paths[::-1]] == [False] * 3 + [True] * 2


# progress -----------------------------------------------------------------------------------------


def test_what_takes_long_is_shown_as_one_task(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"\0" * (3 << 20))
    quick, shown = Notes(), Notes()
    Digests(listener=quick).of_all([file, other], "Reading m")
    assert quick.tasks == []
    monkeypatch.setattr(module, "_LONG", 1 << 20)
    found = Digests(listener=shown)
    found.of_all([file, other], "Reading m")
    assert shown.tasks == [("Reading m", 3, "MiB", 0)] and sum(shown.advanced) == 3
    found.of(other)
    assert len(shown.tasks) == 1, "it is not read again"
