"""Files: all or nothing, hashes, JSON, and names that stay inside their folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.numpy

from nbl_export import files
from nbl_export.errors import InputError
from nbl_export.files import (
    JSON_LIMIT,
    Digests,
    atomic_path,
    locked,
    member,
    printable,
    printable_lines,
    read_bytes,
    read_json,
    read_sealed,
    sha256_of,
    stays_in,
    write_json,
    write_sealed,
    write_text,
)
from nbl_export.records import from_json, part_from_json, to_json
from nbl_export.tensorfile import format_of, load_tensors, save_tensors
from tests.processes import files_in


def test_atomic_path_replaces_the_file_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.json"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert temporary.parent == target.parent  # a rename across file systems would not be atomic
        assert not target.exists()
    with atomic_path(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert files_in(tmp_path) == {"new/file.json"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_atomic_path_keeps_the_old_file_and_no_temporary_when_the_block_fails(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert target.read_text() == "old"
    assert files_in(tmp_path) == {"file.json"}


def test_write_json_refuses_numbers_that_json_has_not_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1, "name": "é"})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1, "name": "é"}


def test_read_json_says_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=r"The thing is missing .*x\.json.*: do that\.$"):
        read_json(path, "The thing", "do that")
    for content in (b'{"a": ', b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"The thing is damaged .*x\.json.*: do that\.$"):
            read_json(path, "The thing", "do that")


def test_the_hub_keeps_the_files_of_a_snapshot_elsewhere(tmp_path: Path) -> None:
    repository = (tmp_path / "models--somebody--model").resolve()
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    assert stays_in(snapshot, repository / "blobs" / "123")
    assert stays_in(snapshot / "onnx", repository / "blobs" / "123")
    assert not stays_in(snapshot, repository / "refs" / "main")
    assert not stays_in(snapshot, tmp_path / "models--other--model" / "blobs" / "123")
    # A folder that is only called so is no cache.
    plain = tmp_path / "snapshots" / "abc"
    assert not stays_in(plain, tmp_path / "blobs" / "123")


def test_a_file_above_its_limit_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(JSON_LIMIT + 1)  # a sparse file
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read_json(path, "The thing", "do that")
    assert read_bytes(path, JSON_LIMIT + 1)[:1] == b"\0"


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b", "..\\x", "C:/x", "out/x", "link", 3, None, ["a"]],
)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x").write_text("somebody's")
    (folder / "out").symlink_to(tmp_path)
    (folder / "link").symlink_to(tmp_path / "x")
    with pytest.raises(InputError, match=r"^A name is .*not the name of a file in"):
        member(folder, name, "A name")


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink() == tmp_path}")
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_text(tmp_path / "x", "text")
    assert calls == ["sync False", "rename", "sync True"]  # the file, its name, the folder


def test_a_lock_keeps_others_out_and_is_never_written_to(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("content")
    with (
        locked(lock, "Busy: wait."),
        pytest.raises(InputError, match=r"^Busy: wait\.$"),
        locked(lock, "Busy: wait."),
    ):
        pass
    with locked(lock, "Busy: wait."):  # it is free again
        assert lock.read_text() == "content"


def test_a_sealed_file_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    write_sealed(path, {"a": 1.5, "b": ["é", None]})
    assert read_sealed(path, "The thing", "do that") == {"a": 1.5, "b": ["é", None]}
    for old, new in (("1.5", "1.6"), ('"a"', '"c"'), ("sha256", "sha")):
        text = path.read_text(encoding="utf-8")
        (tmp_path / "edited.json").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(InputError, match=r"The thing was changed after it was written .*: do that\.$"):
            read_sealed(tmp_path / "edited.json", "The thing", "do that")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="was changed after it was written"):
        read_sealed(tmp_path / "list.json", "The thing", "do that")


def test_foreign_text_is_shown_as_text_a_terminal_does_not_obey() -> None:
    assert printable("a\x1b[2J\u202e\nb é模") == "a\ufffd[2J\ufffd\ufffdb é模"
    assert printable_lines("a\x1b\tb\nc\u2003d") == "a\ufffd    b\nc d"


# tensorfile ----------------------------------------------------------------------------------------

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "b": np.array([1, 2], dtype=np.int64),
    "c": np.zeros((0, 2), np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "x.safetensors", "kind/1", ARRAYS, {"note": "n"})
    return tmp_path / "x.safetensors"


def test_round_trip(path: Path) -> None:
    tensors, metadata = load_tensors(path, "kind/1", "do it again")
    assert metadata == {"format": "kind/1", "note": "n"}
    assert format_of(path) == "kind/1"
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


def test_a_changed_bit_is_refused_wherever_it_is(path: Path) -> None:
    raw = path.read_bytes()
    for position in (len(raw) - 1, raw.index(b"note") + 1, raw.index(b"kind/1")):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(InputError, match="do it again"):
            load_tensors(path, "kind/1", "do it again")


def test_another_format_says_which(path: Path) -> None:
    with pytest.raises(InputError, match=r"kind/1, expected kind/2\): do it again"):
        load_tensors(path, "kind/2", "do it again")
    safetensors.numpy.save_file({"a": ARRAYS["a"]}, path)
    with pytest.raises(InputError, match="no mark of nbl-export"):
        load_tensors(path, "kind/1", "do it again")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_what_is_no_safetensors_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_tensors(path, "kind/1", "do it again")
    with pytest.raises(InputError, match="no readable safetensors"):
        format_of(path)


def test_a_full_disk_keeps_its_error_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    before = path.read_bytes()
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError) as caught:
        save_tensors(path, "kind/1", ARRAYS)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# records -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    layer: int
    kl: float
    kind: Literal["full", "sliding"] = "full"


@dataclass(frozen=True)
class Other:
    saved: float


@dataclass(frozen=True)
class Page:
    title: str
    rows: tuple[Row, ...]
    first: Row | None = None
    either: Row | Other | None = None
    by_layer: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    free: Mapping[str, Any] = field(default_factory=dict)


PAGE = Page(
    "loss",
    (Row(0, 0.25), Row(1, math.inf, "sliding"), Row(2, math.nan)),
    first=Row(2, -math.inf),
    either=Other(1.5),
    by_layer={"3": 0.5},
    notes=["a", "b"],
    free={"any": [1, {"thing": None}]},
)


def read(raw: Any) -> Page:
    return from_json(Page, raw, "The page", "write it again")


def test_a_value_survives_json() -> None:
    again = read(json.loads(json.dumps(to_json(PAGE), allow_nan=False)))
    assert (
        again.rows[:2] == PAGE.rows[:2]
        and math.isnan(again.rows[2].kl)
        and again.first == PAGE.first
        and again.either == PAGE.either
    )
    assert dict(again.by_layer) == PAGE.by_layer and list(again.notes) == PAGE.notes
    assert again.free == PAGE.free and again.title == PAGE.title
    assert read({"title": "x", "rows": []}) == Page("x", ())
    assert isinstance(again.rows, tuple) and isinstance(again.rows[0], Row)


BAD = {
    "an unknown field": {"title": "x", "rows": [], "titel": "y"},
    "an unknown field inside": {"title": "x", "rows": [{"layer": 0, "kl": 1.0, "kll": 2}]},
    "no title": {"rows": []},
    "a number for a string": {"title": 3, "rows": []},
    "a string for a number": {"title": "x", "rows": [{"layer": 0, "kl": "much"}]},
    "a string for a count": {"title": "x", "rows": [{"layer": "0", "kl": 1.0}]},
    "true for a count": {"title": "x", "rows": [{"layer": True, "kl": 1.0}]},
    "a word that is no choice": {"title": "x", "rows": [{"layer": 0, "kl": 1.0, "kind": "other"}]},
    "a list": [1, 2],
    "nothing": None,
    "rows that are a number": {"title": "x", "rows": 4},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_page_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match=r"^The page is damaged \(.+\): write it again\.$") as caught:
        read(BAD[name])
    assert "\n" not in str(caught.value)


def test_a_part_of_an_object() -> None:
    asked = {"layer": 3, "kl": 0.5, "other": [1]}
    assert part_from_json(Row, asked, "The row", "write it again") == Row(3, 0.5)
    for bad in ({**asked, "layer": "3"}, {"layer": 3}):
        with pytest.raises(InputError, match=r"^The row is damaged \(.+\): write it again\.$"):
            part_from_json(Row, bad, "The row", "write it again")


# digests -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read, in order."""
    names: list[str] = []

    def counted(stream: Any) -> str:
        names.append(Path(stream.name).name)
        return sha256_of(stream)

    monkeypatch.setattr(files, "sha256_of", counted)
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
    def disturbed(stream: Any) -> str:
        found = sha256_of(stream)
        time.sleep(0.05)
        changed_in_place(file)
        return found

    monkeypatch.setattr(files, "sha256_of", disturbed)
    found = Digests()
    assert found.of(file) != digest_of(file)
    monkeypatch.undo()
    assert found.of(file) == digest_of(file)


def test_a_copied_folder_brings_no_digests(file: Path, tmp_path: Path, reads: list[str]) -> None:
    read_by_the_next(file, tmp_path, reads)
    shutil.move(file, tmp_path / "moved")
    shutil.copy2(tmp_path / "moved", file)
    assert read_by_the_next(file, tmp_path, reads)


@pytest.mark.parametrize("content", [b"[]", b"{"])
def test_a_damaged_file_is_ignored_and_written_anew(
    file: Path, tmp_path: Path, reads: list[str], content: bytes
) -> None:
    kept(tmp_path).write_bytes(content)
    assert [read_by_the_next(file, tmp_path, reads) for _ in range(2)] == [True, False]
