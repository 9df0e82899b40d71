"""Read and write ONNX files with external data, safely and atomically."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_from_external

from nbl_export.errors import BuildError, InputError
from nbl_export.files import TEMPORARY, atomic_path, sync
from nbl_export.graph.tensors import (
    Slot,
    external_files,
    external_tensors,
    follow_links,
    reference,
    set_folder,
    slots,
    source_file,
)

DATA_SUFFIX = ".data"
# Tensors smaller than this stay inside the .onnx file, so that shape inference sees shape constants.
INLINE_BYTES = 1024
# The ONNX specification recommends page-aligned offsets, so that a reader can map a single tensor.
_PAGE, _PAGE_FROM, _ALIGNED = 4096, 64 << 10, 64
_BLOCK = 8 << 20  # small enough for interrupts and progress, large enough for full speed
Check = Callable[[Path], object]
Progress = Callable[[int], object] | None
# onnx_ir's warnings are errors with a message here.
logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def load_graph(path: Path) -> ir.Model:
    """Open an ONNX file; weights stay on disk, memory-mapped.

    Raises :class:`InputError` if the file is not an ONNX file, or if its external data is missing, too short, or
    outside the file's own folder (a path outside the folder is never opened).
    """
    if not path.is_file():
        raise InputError(f"The ONNX file {path} does not exist.")
    try:
        model: ir.Model = ir.from_proto(onnx.load(path, load_external_data=False))
        model.graph.sort()
        if model.graph.num_nodes() == 0:
            raise ValueError("its graph is empty")
    except Exception as error:  # protobuf, UnicodeDecode, ValueError: whatever a broken file provokes
        raise InputError(f"{path} is not a readable ONNX file ({_cause(error)}): export it again.") from None
    set_folder(model, path.parent)
    try:
        for where, tensor in external_tensors(model):
            source_file(where, tensor)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return model


def _cause(error: BaseException) -> str:
    """The innermost exception in one line: parsers wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}" if first.isprintable() else type(error).__name__


def passes_checker(path: Path) -> bool:
    """Whether the ONNX checker accepts a file; it refuses operators that onnxruntime adds to ONNX's domain."""
    try:
        check_file(path)
    except BuildError:
        return False
    return True


def check_file(path: Path) -> None:
    """Check a written file with the ONNX checker and strict shape inference; raises :class:`BuildError`."""
    try:
        onnx.checker.check_model(str(path))
        # Shape inference needs no weights, so the external data is not loaded.
        proto = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except Exception as error:
        raise BuildError(f"{path} does not pass the ONNX checker: {str(error).splitlines()[0]}") from error


def save_graph(
    model: ir.Model,
    path: Path,
    check: Check = check_file,
    progress: Progress = None,
    readers: Sequence[Path] = (),
    data_name: str = "",
) -> list[Path]:
    """Write ``model`` to ``path``, with one external data file next to it; returns the files.

    The data file is called ``data_name``; without one it keeps its name if the model has exactly one. ``check``
    receives the complete new graph under a temporary name, with its data under another, and raises to refuse it: a
    failed check, a full disk or an interrupt leaves the old files. ``progress`` receives the bytes written.
    ``readers`` are other graphs that read the data file: they are deleted before it is replaced. In the model, links of
    external data are resolved.
    """
    files = external_files(model)
    kept = files[0].name if len(files) == 1 and files[0].name != path.name else path.name + DATA_SUFFIX
    return _save(model, path, data_name or kept, None, check, progress, readers)


def save_beside(
    model: ir.Model, path: Path, check: Check = check_file, progress: Progress = None, data: str = ""
) -> list[Path]:
    """Write ``model`` to ``path``; weights in its folder or below stay where they are, a data file has the others.

    Returns the files written; the data file's name is ``data``, or as usual. The rest is as in :func:`save_graph`.
    """
    return _save(model, path, data or path.name + DATA_SUFFIX, path.parent.resolve(), check, progress, ())


def _save(
    model: ir.Model,
    path: Path,
    data_name: str,
    folder: Path | None,
    check: Check,
    progress: Progress,
    readers: Sequence[Path],
) -> list[Path]:
    """Write ``model``; weights that are read from ``folder`` stay there."""
    follow_links(model, folder)
    data, places = path.with_name(data_name), list(slots(model))
    moving, inline = [], []
    for slot in places:
        external = isinstance(slot.tensor, ir.ExternalTensor)
        if (
            isinstance(slot.tensor, ir.ExternalTensor)
            and Path(slot.tensor.base_dir or ".").resolve() == folder
        ):
            continue
        if slot.tensor.dtype != ir.DataType.STRING and slot.tensor.nbytes >= INLINE_BYTES:
            # An attribute in memory was read from a protobuf, and fits into one.
            moving += [slot] if external or slot.attribute is None else []
        else:
            inline += [slot] if external else []
    small = convert_tensors_from_external([slot.tensor for slot in inline])
    stored = dict(zip(map(id, inline), small, strict=True))
    with ExitStack() as files:
        graph = files.enter_context(atomic_path(path))
        if moving:
            new = files.enter_context(atomic_path(data))
            with new.open("r+b", buffering=0) as file:
                out = DataFile(file.fileno(), new, progress)
                moved = {id(slot): out.add(slot.where, slot.tensor) for slot in moving}
            graph.write_bytes(_serialized(model, places, stored | moved))
            check(graph)
            for key, tensor in moved.items():
                stored[key] = reference(tensor, data.parent, data.name, tensor.offset)
        graph.write_bytes(_serialized(model, places, stored))
        if not moving:
            check(graph)
        if data.exists():
            # No kill leaves the old graph with the new data: it would load, and compute something else.
            delete_graphs((path, *readers))
            if not moving:
                data.unlink()
    return [path, data] if moving else [path]


def _serialized(model: ir.Model, places: Sequence[Slot], stored: Mapping[int, ir.TensorProtocol]) -> bytes:
    try:
        for slot in places:
            slot.put(stored.get(id(slot), slot.tensor))
        blob: bytes = ir.to_proto(model).SerializeToString()
        return blob
    finally:
        for slot in places:
            slot.put(slot.tensor)


class DataFile:
    """The data file ``path`` of a graph, open as ``descriptor``: its tensors one after the other.

    ``progress`` receives the bytes written by each step. A tensor of another data file is copied from file to file,
    never through a memory map: mapped pages count as resident memory, and an 8B model has 16 GB of them.
    """

    def __init__(self, descriptor: int, path: Path, progress: Progress) -> None:
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


def save_again(model: ir.Model, path: Path, check: Check = check_file) -> list[Path]:
    """Overwrite ``path`` with ``model``, which was read from it; no weight is moved. Returns the graph and its data."""
    with atomic_path(path) as graph:
        ir.save(model, graph, format="protobuf")
        check(graph)
    return [path, *external_files(model)]


def delete_graphs(graphs: Iterable[Path]) -> None:
    """Delete ``graphs``, durably, before the data that they read is replaced."""
    for graph in graphs:
        if graph.exists():
            graph.unlink()
            sync(graph.parent)


@contextmanager
def scratch_copy(path: Path, change: Callable[[ir.Model], object]) -> Iterator[Path]:
    """A temporary, changed copy of the graph at ``path``, next to it and sharing its data file."""
    model = load_graph(path)
    change(model)
    with scratch(model, path.parent) as temporary:
        yield temporary


@contextmanager
def scratch(model: ir.Model, folder: Path) -> Iterator[Path]:
    """A temporary file of ``model`` in ``folder``, where its external data lies, which stays where it is."""
    handle, temporary = tempfile.mkstemp(prefix=".scratch.", suffix=TEMPORARY, dir=folder)
    os.close(handle)
    try:
        ir.save(model, temporary, format="protobuf")
        yield Path(temporary)
    finally:
        Path(temporary).unlink(missing_ok=True)
