"""Write the data file of a graph: its tensors, one after the other, each distinct byte range once.

A tensor of another data file is copied from file to file, never through a memory map: mapped pages count as resident
memory, and an 8B model has 16 GB of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import InputError
from nbl_export.graph.tensors import reference, source_file

# The ONNX specification recommends page-aligned offsets, so that a reader can map a single tensor.
_PAGE, _PAGE_FROM, _ALIGNED = 4096, 64 << 10, 64
_BLOCK = 8 << 20  # small enough for interrupts and progress, large enough for full speed


class DataFile:
    """The data file ``path``, open as ``descriptor``; ``progress`` receives the bytes written by each step."""

    def __init__(self, descriptor: int, path: Path, progress: Callable[[int], object] | None) -> None:
        self._descriptor, self._path, self._progress = descriptor, path, progress
        self._offsets: dict[tuple[object, ...], int] = {}
        self._end = 0

    def add(self, where: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write ``tensor``, called ``where``, unless its bytes are already written; returns the reference to them."""
        key: tuple[object, ...] = (id(tensor),)
        if isinstance(tensor, ir.ExternalTensor):
            key = (source_file(where, tensor), tensor.offset or 0, tensor.nbytes)
        if key not in self._offsets:
            step = _PAGE if tensor.nbytes >= _PAGE_FROM else _ALIGNED
            self._end = -(-self._end // step) * step
            self._offsets[key] = self._end
            if isinstance(tensor, ir.ExternalTensor):
                self._copy(where, tensor)
            else:
                self._write(tensor)
        return reference(tensor, self._path.parent, self._path.name, self._offsets[key])

    def _copy(self, where: str, tensor: ir.ExternalTensor) -> None:
        at = tensor.offset or 0
        stop = at + tensor.nbytes
        with source_file(where, tensor).open("rb", buffering=0) as source:
            while at < stop:
                most = min(_BLOCK, stop - at)
                try:
                    copied = os.copy_file_range(source.fileno(), self._descriptor, most, at, self._end)
                except (AttributeError, OSError):  # macOS, or from another file system
                    copied = os.pwrite(self._descriptor, os.pread(source.fileno(), most, at), self._end)
                if not copied:
                    raise InputError(
                        f"{tensor.path} became shorter while {where} was read: stop other programs that write to it."
                    )
                at += copied
                self._advance(copied)

    def _write(self, tensor: ir.TensorProtocol) -> None:
        if tensor.dtype.bitwidth < 8:
            raw = memoryview(tensor.tobytes())  # packed
        else:  # as it is in memory: a copy of the largest weight would take as much again
            raw = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
        while raw:
            written = os.pwrite(self._descriptor, raw[:_BLOCK], self._end)
            raw = raw[written:]
            self._advance(written)

    def _advance(self, amount: int) -> None:
        self._end += amount
        if self._progress is not None:
            self._progress(amount)
