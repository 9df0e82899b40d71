"""Array files come back bit for bit, and nothing else comes back at all."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nbl_export.errors import InputError
from nbl_export.tensorfile import format_of, load_tensors, save_tensors

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
    with pytest.raises(InputError, match="not a readable safetensors"):
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
