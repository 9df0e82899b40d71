"""Tensors are copied whole from file to file, on any kernel; what cannot be copied is an error."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import InputError
from nbl_export.graph import data_file
from nbl_export.graph.external_data import write_graph
from tests.graph.external_data import DATA, raw, resolved


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_kernel_copies_blocks_are_read_and_written(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(data_file, "_BLOCK", 1000)
    out = tmp_path / "model.onnx"
    write_graph(ir.load(two_files), out, DATA)
    assert resolved(out) == resolved(two_files)


@pytest.mark.parametrize("how", ["absent", "zero", "short"])
def test_other_kernels(two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    real = os.copy_file_range
    if how == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif how == "zero":  # some file systems copy nothing and report no error
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    else:
        monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, a, b: real(s, t, min(n, 777), a, b))
    out = tmp_path / "model.onnx"
    write_graph(ir.load(two_files), out, DATA)
    assert resolved(out) == resolved(two_files)


def test_short_writes_are_continued(two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:5000], at))
    model = ir.load(two_files)
    values = np.random.default_rng(5).standard_normal(50_000).astype(np.float32)
    model.graph.initializers["large"].const_value = ir.tensor(values)
    out = tmp_path / "model.onnx"
    write_graph(model, out, DATA)
    assert raw(out) == {**raw(two_files), "large": values.tobytes()}


def test_real_errors_of_a_kernel_copy_are_not_hidden(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        write_graph(ir.load(two_files), out, DATA)
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"] and out.read_bytes() == b"old"


@pytest.mark.parametrize("inside", [False, True])
def test_a_source_that_shrinks_meanwhile_is_noticed(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    real = os.open

    def shrink(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path).name == "a.bin":
            os.truncate(path, 100)
        return real(path, *rest, **more)

    model = ir.load(two_files)
    monkeypatch.setattr(os, "open", shrink)
    with pytest.raises(InputError, match=r"a\.bin (became shorter|is truncated)"):
        write_graph(model, tmp_path / "model.onnx", None if inside else DATA)


@pytest.mark.parametrize("dtype", [d for d in ir.DataType if d.name not in ("UNDEFINED", "STRING")])
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 2)])
def test_every_type_is_written_as_onnx_stores_it(
    dtype: ir.DataType, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """A transposed view too: it is not contiguous."""
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype.numpy()).T
    tensor = ir.Tensor(numbers, dtype=dtype, name="w")
    with (tmp_path / "data").open("w+b", buffering=0) as file:
        written = data_file.DataFile(file.fileno(), tmp_path / "data", None).add("w", tensor)
        file.seek(0)
        assert file.read() == ir.serde.serialize_tensor(tensor).raw_data
    assert written.nbytes == tensor.nbytes


def test_a_weight_is_not_copied_to_be_written(tmp_path: Path) -> None:
    weight = ir.tensor(np.zeros(8 << 20, dtype=np.uint8))
    with (tmp_path / "data").open("wb", buffering=0) as file:
        tracemalloc.start()
        data_file.DataFile(file.fileno(), tmp_path / "data", None).add("w", weight)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20
