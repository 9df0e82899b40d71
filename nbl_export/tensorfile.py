"""Keep named arrays on disk: safetensors files, written atomically and verified when read.

Each file carries a SHA-256 of its content, so that a changed bit is an error and not a wrong result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nbl_export.errors import InputError
from nbl_export.files import atomic_path

_KEY = "nbl_export"
_FORMAT = "format"
_DIGEST = "sha256"
_T = TypeVar("_T")


def save_tensors(
    path: Path, fmt: str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` as a file of format ``fmt``; raises ``OSError`` if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            marked = {**(metadata or {}), _FORMAT: fmt}
            marked[_DIGEST] = _digest(contiguous, marked)
            # One key: the library writes several keys in random order, and equal content should give equal bytes.
            save_file(contiguous, temporary, {_KEY: json.dumps(marked, sort_keys=True)})
        except SafetensorError as error:
            # The library wraps the operating system's error in text; callers need the error itself.
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
            raise


class StoredTensors(Mapping[str, Any]):
    """The arrays of a file by name. Each access reads from disk and caches nothing: a file may exceed memory."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, tuple(names)

    def __getitem__(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="numpy") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_tensors(path: Path, fmt: str, remedy: str) -> tuple[StoredTensors, dict[str, str]]:
    """The tensors and metadata of a file of format ``fmt``; its SHA-256 is checked once, tensor by tensor.

    Raises :class:`InputError` with the ``remedy`` if the file is missing, damaged or has another format.
    """
    tensors, metadata = _opened(path, remedy)
    if metadata.get(_FORMAT) != fmt:
        found = metadata.get(_FORMAT, "no mark of nbl-export")
        raise InputError(f"{path} is of another format ({found}, expected {fmt}): {remedy}.")
    if metadata.pop(_DIGEST, None) != _digest(tensors, metadata):
        raise InputError(f"{path} was changed after it was written: {remedy}.")
    return tensors, metadata


def format_of(path: Path) -> str:
    """The format of a safetensors file, "" if it was not written by nbl-export; :class:`InputError` if unreadable."""
    return _opened(path, "it is no readable safetensors file")[1].get(_FORMAT, "")


def _opened(path: Path, remedy: str) -> tuple[StoredTensors, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(json.loads((file.metadata() or {}).get(_KEY, "{}")))
            return StoredTensors(path, sorted(file.keys())), metadata
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}.") from None


def load_tensors(path: Path, fmt: str, remedy: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Like :func:`open_tensors`, with all tensors in memory."""
    tensors, metadata = open_tensors(path, fmt, remedy)
    return dict(tensors), metadata


def load_as(kind: type[_T], path: Path, fmt: str, remedy: str) -> _T:
    """A ``kind`` whose fields are the tensors of the file; raises :class:`InputError` if the names differ."""
    tensors, _ = load_tensors(path, fmt, remedy)
    try:
        return kind(**tensors)
    except TypeError as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}.") from None


def _digest(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
