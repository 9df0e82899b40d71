"""Read and write ONNX files with external data, safely and atomically.

Weights are not only initializers of the graph: they are also in subgraphs, Constant nodes and function bodies. What
checks or moves a model's external data sees them all (:func:`slots`).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.external_data import convert_tensors_from_external

from nbl_export.errors import BuildError, InputError, first_line
from nbl_export.files import TEMPORARY, atomic_path, printable, stays_in, sync

DATA_SUFFIX = ".data"
# Tensors smaller than this stay inside the .onnx file, so that shape inference sees shape constants.
INLINE_BYTES = 1024
# Where a graph lies, in what is said of it in memory alone.
FOLDER = "nbl_export.folder"
# The ONNX specification recommends page-aligned offsets, so that a reader can map a single tensor.
_PAGE, _PAGE_FROM, _ALIGNED = 4096, 64 << 10, 64
_BLOCK = 8 << 20  # small enough for interrupts and progress, large enough for full speed
Check = Callable[[Path], object]
Progress = Callable[[int], object] | None
# onnx_ir's warnings are errors with a message here.
logging.getLogger("onnx_ir").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Slot:
    """The place of a ``tensor``: an initializer, or the ``attribute`` of a node. ``where`` names it in messages."""

    where: str
    tensor: ir.TensorProtocol
    owner: ir.Value | ir.Node
    attribute: str = ""

    def put(self, tensor: ir.TensorProtocol) -> None:
        """Replace the tensor by another."""
        if isinstance(self.owner, ir.Value):
            self.owner.const_value = tensor
        else:
            doc = self.owner.attributes[self.attribute].doc_string
            self.owner.attributes[self.attribute] = ir.AttrTensor(self.attribute, tensor, doc_string=doc)


def slots(model: ir.Model) -> Iterator[Slot]:
    """Every place of a tensor in the graph, its subgraphs and function bodies."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield Slot(value.name or "an initializer", value.const_value, value)
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for body in bodies for node in body.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                where = f"attribute {attribute.name} of node {node.name or node.op_type}"
                yield Slot(where, attribute.as_tensor(), node, attribute.name)


def external_tensors(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """Every tensor of ``model`` in a data file, with a name for messages; a shared one is listed for each use."""
    return ((s.where, s.tensor) for s in slots(model) if isinstance(s.tensor, ir.ExternalTensor))


def external_files(model: ir.Model) -> list[Path]:
    """The data files that ``model`` reads, in order of first use; they are not opened."""
    return list(dict.fromkeys(Path(tensor.path) for _, tensor in external_tensors(model)))


def set_folder(model: ir.Model, folder: Path) -> None:
    """Read every external tensor from ``folder``; it is noted in memory."""
    model.meta[FOLDER] = folder
    for _, tensor in external_tensors(model):
        tensor.base_dir = folder


def follow_links(model: ir.Model, folder: Path | None = None) -> Path | None:
    """Name external files by their real paths from ``folder``, in place, if they lie in it or below it.

    onnxruntime does not follow a link out of its folder. Without a ``folder``, it is the common parent of the files.
    Returns it, and None without external data.
    """
    files = {id(tensor): source_file(where, tensor) for where, tensor in external_tensors(model)}
    if not files:
        return None
    folder = folder or Path(os.path.commonpath([file.parent for file in files.values()]))
    for slot in list(slots(model)):
        file, tensor = files.get(id(slot.tensor)), slot.tensor
        if file is not None and file.is_relative_to(folder) and isinstance(tensor, ir.ExternalTensor):
            slot.put(_reference(tensor, folder, file.relative_to(folder), tensor.offset))
    return folder


def _reference(
    tensor: ir.TensorProtocol, folder: Path, location: str | Path, offset: int | None
) -> ir.ExternalTensor:
    """``tensor`` as one whose bytes are in the file ``location`` of ``folder``, from ``offset`` on."""
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


def source_file(where: str, tensor: ir.ExternalTensor) -> Path:
    """The resolved path of the file that stores ``tensor``, called ``where``.

    Raises :class:`InputError` if it is missing, too short, or outside the tensor's folder; such a file is never opened.
    """
    location, folder = Path(tensor.location), Path(tensor.base_dir or ".").resolve()
    target = (folder / location).resolve()
    if location.is_absolute() or not stays_in(folder, target):
        raise InputError(
            f"The external data of {where} lies outside its folder ({location}) and is not read: move it there."
        )
    if not target.is_file():
        raise InputError(f"The external data {location} of {where} is missing: put the file into {folder}.")
    offset, length, size = tensor.offset or 0, tensor.nbytes, target.stat().st_size
    if offset < 0 or offset + length > size or tensor.length not in (None, length):
        raise InputError(
            f"{target} is truncated or another graph's: {where} is at bytes {offset:,} to {offset + length:,}, the "
            f"file has {size:,}; export the model again."
        )
    return target


def int64_initializer(graph: ir.Graph, name: str, numbers: int | Sequence[int]) -> ir.Value:
    """An int64 initializer [] or [n] of ``graph``; equal values share one initializer.

    It is called ``name`` or, if that name is used for other values, ``name``.1, .2 and so on.
    """
    array, free, numbered = np.array(numbers, dtype=np.int64), name, count(1)
    while (known := graph.initializers.get(free)) is not None:
        if known.const_value is not None and np.array_equal(known.const_value.numpy(), array):
            return known
        free = f"{name}.{next(numbered)}"
    return initializer(graph, ir.tensor(array, name=free), free)


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """A new initializer of ``graph`` with the numbers of ``tensor``."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


# reading ------------------------------------------------------------------------------------------


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
        cause = printable(first_line(error.__cause__ or error))[:200]
        raise InputError(f"{path} is not a readable ONNX file ({cause}): export it again.") from None
    set_folder(model, path.parent)
    try:
        for where, tensor in external_tensors(model):
            source_file(where, tensor)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return model


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
        raise BuildError(f"{path} does not pass the ONNX checker: {first_line(error)}") from error


# writing ------------------------------------------------------------------------------------------


def save_graph(
    model: ir.Model,
    path: Path,
    check: Check = check_file,
    progress: Progress = None,
    readers: Sequence[Path] = (),
    data: str = "",
    beside: bool = False,
) -> list[Path]:
    """Write ``model`` to ``path``, with one external data file next to it; returns the files written.

    The data file is called ``data``; without a name it keeps its own if the model has exactly one. ``check`` receives
    the complete new graph under a temporary name, with its data under another, and raises to refuse it: a failed check,
    a full disk or an interrupt leaves the old files. ``progress`` receives the bytes written. ``readers`` are other
    graphs that read the data file: they are deleted before it is replaced. Weights that lie in the folder or below stay
    where they are with ``beside``. ``model`` then reads what was written.
    """
    folder, files = path.parent.resolve() if beside else None, [] if beside else external_files(model)
    kept = files[0].name if len(files) == 1 and files[0].name != path.name else path.name + DATA_SUFFIX
    target = path.with_name(data or kept)
    follow_links(model, folder)
    moving = [slot for slot in list(slots(model)) if _moves(slot, folder)]
    with ExitStack() as stack:
        graph = stack.enter_context(atomic_path(path))
        if moving:
            new = stack.enter_context(atomic_path(target))
            with new.open("r+b", buffering=0) as file:
                out = DataFile(file, new, progress)
                moved = [out.add(slot.where, slot.tensor) for slot in moving]
            for slot, tensor in zip(moving, moved, strict=True):
                slot.put(tensor)
        graph.write_bytes(ir.to_proto(model).SerializeToString())
        check(graph)
        if moving:
            for slot, tensor in zip(moving, moved, strict=True):
                slot.put(_reference(tensor, target.parent, target.name, tensor.offset))
            graph.write_bytes(ir.to_proto(model).SerializeToString())
        if target.exists():
            # No kill leaves the old graph with the new data: it would load, and compute something else.
            delete_graphs((path, *readers))
            if not moving:
                target.unlink()
    return [path, target] if moving else [path]


def save_beside(
    model: ir.Model, path: Path, check: Check = check_file, progress: Progress = None, data: str = ""
) -> list[Path]:
    """:func:`save_graph` with the weights of its folder, or below, left where they are."""
    return save_graph(model, path, check, progress, data=data, beside=True)


def _moves(slot: Slot, folder: Path | None) -> bool:
    """Whether a tensor goes to the new data file; one that is too small for it is brought into the graph."""
    tensor, external = slot.tensor, isinstance(slot.tensor, ir.ExternalTensor)
    if isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir or ".").resolve() == folder:
        return False
    if tensor.dtype != ir.DataType.STRING and tensor.nbytes >= INLINE_BYTES:
        # An attribute in memory was read from a protobuf, and fits into one.
        return external or not slot.attribute
    if external:
        slot.put(convert_tensors_from_external([tensor])[0])
    return False


class DataFile:
    """The data ``file`` of a graph, open unbuffered, at ``path``: its tensors one after the other.

    ``progress`` receives the bytes written by each step.
    """

    def __init__(self, file: BinaryIO, path: Path, progress: Progress) -> None:
        self._file, self._path, self._progress = file, path, progress
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
            self._offsets[key] = self._file.seek(self._end)
            for block in _blocks(where, tensor):
                while block:
                    written = self._file.write(block)
                    block, self._end = block[written:], self._end + written
                    if self._progress is not None:
                        self._progress(written)
        return _reference(tensor, self._path.parent, self._path.name, self._offsets[key])


def _blocks(where: str, tensor: ir.TensorProtocol) -> Iterator[Any]:
    """The bytes of ``tensor``, a few MB at a time.

    Those of a data file are read, never through a memory map: mapped pages count as resident memory, and an 8B model
    has 16 GB of them.
    """
    if isinstance(tensor, ir.ExternalTensor):
        with source_file(where, tensor).open("rb", buffering=0) as source:
            left = tensor.nbytes
            source.seek(tensor.offset or 0)
            while left:
                block = source.read(min(_BLOCK, left))
                if not block:
                    raise InputError(
                        f"{tensor.path} became shorter while {where} was read: stop other programs that write to it."
                    )
                left -= len(block)
                yield block
        return
    if tensor.dtype.bitwidth < 8:
        packed = np.frombuffer(tensor.tobytes(), np.uint8)
        yield from (part.data for _, part in in_parts(packed, _BLOCK))
        return
    array = tensor.numpy()
    for _, part in in_parts(array, _BLOCK // array.itemsize):
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def in_parts(array: NDArray[Any], numbers: int) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Parts of ``array`` along its first axis, of so many ``numbers`` or one row: where, and the part.

    A copy of a part, where it is turned, is small: one of the largest weight would take as much again.
    """
    rows = np.atleast_1d(array)
    step = max(1, numbers // max(1, rows[0].size)) if len(rows) else 1
    for at in range(0, len(rows), step):
        yield slice(at, at + step), rows[at : at + step]


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
