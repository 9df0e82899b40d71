"""Appending to a data file in place: the old graph is valid at every moment until the new one is."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from nbl_export.errors import BuildError
from nbl_export.graph import data_file
from nbl_export.graph.external_data import append_graph
from tests.graph.external_data import (
    DATA,
    external,
    graph_of,
    places,
    random_bytes,
    raw,
    resolved,
    save,
    snapshot,
)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A graph with two external weights in a data file of its own; see :func:`changed`."""
    proto = graph_of(
        [
            external("kept", TensorProto.FLOAT, [1000], (DATA, 3, 4000)),
            external("changed", TensorProto.FLOAT, [100, 250], (DATA, 5000, 100_000)),
        ]
    )
    return save(proto, tmp_path / "own" / "model.onnx", random_bytes(105_000), DATA)


NEW = np.random.default_rng(9).standard_normal((100, 250)).astype(np.float32)


def changed(path: Path) -> ir.Model:
    model = ir.load(path)
    model.graph.initializers["changed"].const_value = ir.tensor(NEW)
    return model


def test_new_weights_are_appended_and_old_ones_stay(own: Path) -> None:
    before, data = raw(own), own.with_name(DATA)
    old = data.read_bytes()
    steps: list[int] = []
    model = changed(own)
    seen = snapshot(model)
    appended = append_graph(model, own, data, steps.append)
    assert snapshot(model) == seen
    assert raw(own) == {"kept": before["kept"], "changed": NEW.tobytes()}
    assert places(own) == {"kept": (DATA, 3, 4000), "changed": (DATA, 106_496, 100_000)}
    assert data.read_bytes()[:105_000] == old
    assert data.stat().st_size == 105_000 + appended
    assert sum(steps) == 100_000
    assert {p.name for p in own.parent.iterdir()} == {"model.onnx", DATA}


def test_appending_twice(own: Path) -> None:
    append_graph(changed(own), own, own.with_name(DATA))
    size = own.with_name(DATA).stat().st_size
    assert append_graph(ir.load(own), own, own.with_name(DATA)) == 0
    assert own.with_name(DATA).stat().st_size == size
    assert raw(own)["changed"] == NEW.tobytes()


def test_other_data_files_of_the_folder_stay(two_files: Path) -> None:
    (two_files.parent / "sub").mkdir()
    (two_files.parent / "b.bin").rename(two_files.parent / "sub" / "b.bin")
    proto = onnx.load(str(two_files), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.value == "b.bin":
                entry.value = "sub/b.bin"
    two_files.write_bytes(proto.SerializeToString())
    reference, before = raw(two_files), places(two_files)
    model = ir.load(two_files)
    values = np.arange(50_000, dtype=np.float32)
    model.graph.initializers["large"].const_value = ir.tensor(values)
    append_graph(model, two_files, two_files.parent / "a.bin")
    assert raw(two_files) == {**reference, "large": values.tobytes()}
    after = places(two_files)
    assert {n: p for n, p in after.items() if n != "large"} == {
        n: p for n, p in before.items() if n != "large"
    }
    assert after["tiny"] == ("sub/b.bin", 100_000, 24)


def test_weights_of_another_folder_are_copied(two_files: Path, own: Path) -> None:
    model = ir.load(two_files)
    append_graph(model, own, own.with_name(DATA))
    reference = resolved(two_files)
    shutil.rmtree(two_files.parent)
    assert resolved(own) == reference
    assert {location for location, _, _ in places(own).values()} == {DATA}


def test_a_missing_data_file_is_made(two_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    append_graph(ir.load(two_files), out, out.with_name(DATA))
    assert resolved(out) == resolved(two_files)


def test_weights_of_a_folder_below_are_copied_too(two_files: Path, tmp_path: Path) -> None:
    """Only what was loaded from the graph's own folder stays: a copy must not lean on another model."""
    out = tmp_path / "model.onnx"
    append_graph(ir.load(two_files), out, out.with_name(DATA))
    reference = resolved(two_files)
    shutil.rmtree(two_files.parent)
    assert resolved(out) == reference


def test_data_elsewhere_is_refused(own: Path, tmp_path: Path) -> None:
    (tmp_path / DATA).write_bytes(b"x")
    with pytest.raises(BuildError, match="is not in the folder of"):
        append_graph(changed(own), own, tmp_path / DATA)
    assert (tmp_path / DATA).read_bytes() == b"x"


def test_a_new_graph_is_checked_before_it_replaces_the_old(own: Path) -> None:
    before = {p: p.read_bytes() for p in own.parent.iterdir()}
    seen: list[bytes] = []

    def accept(path: Path) -> None:
        assert path != own and own.read_bytes() == before[own]
        seen.append(raw(path)["changed"])

    def refuse(path: Path) -> None:
        accept(path)
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        append_graph(changed(own), own, own.with_name(DATA), check=refuse)
    assert {p: p.read_bytes() for p in own.parent.iterdir()} == before
    append_graph(changed(own), own, own.with_name(DATA), check=accept)
    assert seen == [NEW.tobytes()] * 2
    assert raw(own)["changed"] == NEW.tobytes()


def test_two_writers_exclude_each_other(own: Path) -> None:
    with own.with_name(DATA).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = {p: p.read_bytes() for p in own.parent.iterdir()}
        with pytest.raises(BuildError, match="Another process is writing"):
            append_graph(changed(own), own, own.with_name(DATA))
        assert {p: p.read_bytes() for p in own.parent.iterdir()} == before
    append_graph(changed(own), own, own.with_name(DATA))


class Cut(BaseException):
    """Stands for an interrupt."""


def failing(real: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    """``real``, but raising ``error`` at call number ``calls``."""
    count = 0

    def call(*given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return real(*given, **more)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (os, "pwrite", 1),
        (os, "pwrite", 7),
        (os, "fsync", 1),
        (os, "fsync", 2),
        (os, "fsync", 3),
        (Path, "replace", 1),
        (Path, "chmod", 1),
        (ir.serde, "serialize_model", 1),
    ],
)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Cut()], ids=["full", "cut"]
)
@pytest.mark.parametrize("present", [True, False], ids=["append", "create"])
def test_an_error_gives_the_old_files_back(
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: BaseException,
    present: bool,
) -> None:
    model, data = changed(own), own.with_name(DATA if present else "new.data")
    seen = snapshot(model)
    before = {p: p.read_bytes() for p in own.parent.iterdir()}
    monkeypatch.setattr(data_file, "_BLOCK", 10_000)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), call, error))
    with pytest.raises(type(error)):
        append_graph(model, own, data)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in own.parent.iterdir()} == before
    assert snapshot(model) == seen
    append_graph(model, own, data)
    assert raw(own)["changed"] == NEW.tobytes()


def test_an_interrupt_after_the_replacement_keeps_the_new_bytes(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        real(self, target)
        raise Cut

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Cut):
        append_graph(changed(own), own, own.with_name(DATA))
    assert raw(own)["changed"] == NEW.tobytes()


def test_data_is_on_disk_before_the_graph_names_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append("data" if name == DATA else "folder" if name == "own" else "graph")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("replace")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    append_graph(changed(own), own, own.with_name(DATA))
    assert events == ["data", "folder", "graph", "replace", "folder"]


_CRASH = """
    import os, sys
    from pathlib import Path
    import numpy as np, onnx_ir as ir
    from nbl_export.graph import data_file, external_data
    path, point, call = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    owner = Path if point == "replace" else os
    real, count = getattr(owner, point), 0
    def crash(*given):
        global count
        count += 1
        if count == call:
            os._exit(9)
        return real(*given)
    setattr(owner, point, crash)
    data_file._BLOCK = 10_000
    model = ir.load(path)
    model.graph.initializers["changed"].const_value = ir.tensor(np.ones((100, 250), np.float32))
    external_data.append_graph(model, path, path.with_name("model.onnx.data"))
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("point", "call", "done"),
    [
        ("pwrite", 4, False),
        ("fsync", 1, False),
        ("fsync", 3, False),
        ("replace", 1, False),
        ("fsync", 4, True),
    ],
)
def test_a_process_that_dies_leaves_a_valid_graph(own: Path, point: str, call: int, done: bool) -> None:
    before = raw(own)
    code = textwrap.dedent(_CRASH)
    ended = subprocess.run([sys.executable, "-c", code, str(own), point, str(call)], check=False)
    assert ended.returncode == 9
    ones = np.ones((100, 250), np.float32).tobytes()
    assert raw(own) == ({**before, "changed": ones} if done else before)
    append_graph(changed(own), own, own.with_name(DATA))
    assert raw(own) == {"kept": before["kept"], "changed": NEW.tobytes()}


_LIMITED = """
    import errno, resource, sys
    from pathlib import Path
    import numpy as np, onnx_ir as ir
    from nbl_export.graph.external_data import append_graph, write_graph
    path, how = Path(sys.argv[1]), sys.argv[2]
    model = ir.load(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    try:
        if how == "append":
            model.graph.initializers["changed"].const_value = ir.tensor(np.ones((100, 250), np.float32))
            append_graph(model, path, path.with_name("model.onnx.data"))
        else:
            write_graph(model, path, "model.onnx.data")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("how", ["append", "write"])
def test_no_room_leaves_what_was_there(own: Path, two_files: Path, how: str) -> None:
    path = own if how == "append" else two_files
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_LIMITED), str(path), how],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "EFBIG"
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before
