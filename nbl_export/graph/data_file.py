"""The data file of a graph while it is written: its tensors, one after the other, each distinct byte range once."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.tensors import source_file

Progress = Callable[[int], object]

# The ONNX specification recommends page-aligned offsets, so that a reader can map a single tensor.
_PAGE, _PAGE_FROM, _ALIGNED = 4096, 64 << 10, 64
# Small enough for interrupts and progress updates, large enough for full speed.
_KERNEL_BLOCK, _BLOCK = 64 << 20, 8 << 20
# Errors which mean that the kernel cannot copy between these two files, not that the copy failed.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def reference(tensor: ir.TensorProtocol, folder: Path, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=folder,
    )


class DataFile:
    """The data file being written: tensors are appended, each distinct byte range once."""

    def __init__(self, descriptor: int, path: Path, progress: Progress | None) -> None:
        self._descriptor, self._path, self._progress = descriptor, path, progress
        self._offsets: dict[tuple[object, ...], int] = {}
        self.end = os.fstat(descriptor).st_size

    def add(self, where: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write ``tensor`` unless its bytes are already written; returns the reference to them."""
        key: tuple[object, ...] = (id(tensor),)
        if isinstance(tensor, ir.ExternalTensor):
            key = (source_file(where, tensor), tensor.offset or 0, tensor.nbytes)
        if key not in self._offsets:
            step = _PAGE if tensor.nbytes >= _PAGE_FROM else _ALIGNED
            self.end = -(-self.end // step) * step
            self._offsets[key] = self.end
            if isinstance(tensor, ir.ExternalTensor):
                self._copy(where, tensor)
            else:
                self._write(where, tensor)
        return reference(tensor, self._path.parent, self._path.name, self._offsets[key])

    def _copy(self, where: str, tensor: ir.ExternalTensor) -> None:
        start = tensor.offset or 0
        stop = start + tensor.nbytes
        with _opened(where, tensor) as source:
            while start < stop:
                copied = _copy_some(source, start, self._descriptor, self.end, stop - start)
                if copied == 0:
                    raise _shrunk(where, tensor)
                start += copied
                self._advance(copied)

    def _write(self, where: str, tensor: ir.TensorProtocol) -> None:
        raw = _bytes_of(tensor)
        if len(raw) != tensor.nbytes:
            raise BuildError(
                f"{where} gives {len(raw):,} bytes, its type and shape say {tensor.nbytes:,}: "
                "correct the code that creates this tensor."
            )
        while raw:
            written = os.pwrite(self._descriptor, raw[:_BLOCK], self.end)
            raw = raw[written:]
            self._advance(written)

    def _advance(self, amount: int) -> None:
        self.end += amount
        if self._progress is not None:
            self._progress(amount)


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes as they are in memory: a copy of the largest weight would take as much again."""
    if tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        return memoryview(tensor.tobytes())  # packed, or in the other order
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def _copy_some(source: int, start: int, target: int, at: int, most: int) -> int:
    """Copy up to ``most`` bytes between two files; returns the number copied, 0 only at the end of ``source``."""
    if hasattr(os, "copy_file_range"):
        try:
            if copied := os.copy_file_range(source, target, min(most, _KERNEL_BLOCK), start, at):
                return copied
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    block = os.pread(source, min(most, _BLOCK), start)
    return os.pwrite(target, block, at) if block else 0


def read_bytes(where: str, tensor: ir.ExternalTensor) -> bytes:
    raw = bytearray()
    with _opened(where, tensor) as source:
        while len(raw) < tensor.nbytes:
            block = os.pread(source, min(_BLOCK, tensor.nbytes - len(raw)), (tensor.offset or 0) + len(raw))
            if not block:
                raise _shrunk(where, tensor)
            raw += block
    return bytes(raw)


def _shrunk(where: str, tensor: ir.ExternalTensor) -> InputError:
    return InputError(
        f"{tensor.path} became shorter while {where} was read: stop other programs that write to it."
    )


@contextmanager
def _opened(where: str, tensor: ir.ExternalTensor) -> Iterator[int]:
    descriptor = os.open(source_file(where, tensor), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
