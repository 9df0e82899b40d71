"""Write a model with external data, copying its weights from file to file without loading them into memory.

A tensor in an external data file is copied by the kernel, byte range to byte range, never through a memory
map: mapped pages count as resident memory, and an 8B model has 16 GB of them. Tensors in memory are written
one after another. Three ways to store a model:
    write_graph    a new .onnx file and one new data file with every weight
    append_graph   a new .onnx file replaces the old one; weights stay where they are, new ones are appended
    write_beside   a new .onnx file; weights in its folder and below stay where they are, a new data file has the others

All leave the model unchanged: its tensors are references to the new file only while the protobuf is serialized.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from enum import Enum, auto
from pathlib import Path

import onnx_ir as ir

from nbl_export.errors import BuildError, NblError
from nbl_export.files import atomic_path, sync
from nbl_export.graph.data_file import DataFile, Progress, read_bytes, reference
from nbl_export.graph.tensors import Slot, all_tensors, external_files, set_folder, slots, source_file

__all__ = [
    "INLINE_BYTES",
    "all_tensors",
    "append_graph",
    "external_files",
    "set_folder",
    "source_file",
    "write_beside",
    "write_graph",
]

# Tensors smaller than this stay inside the .onnx file, so that shape inference sees shape constants.
INLINE_BYTES = 1024
# The limit of protobuf is 2 GiB; the margin is for nodes and names.
PROTOBUF_BYTES = (1 << 31) - (64 << 20)


class _Destination(Enum):
    """Where a tensor is stored: in the .onnx file, moved to the data file, or left where it is."""

    INLINE = auto()
    MOVES = auto()
    STAYS = auto()


def write_graph(
    model: ir.Model,
    path: Path,
    data_name: str | None,
    inline_below: int = INLINE_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``model`` to ``path`` and its weights to the file ``data_name`` next to it; returns both paths.

    Initializers of at least ``inline_below`` bytes, and attributes of that size that are already external, are
    stored in the data file; a byte range shared by several tensors is stored once. If ``data_name`` is None or
    every tensor is smaller, all are stored in ``path`` and there is no data file. ``progress`` receives the
    bytes written by each step.

    Raises :class:`InputError` for a source that :func:`source_file` refuses, and :class:`BuildError` if the
    tensors in ``path`` exceed protobuf's 2 GiB or if the data file is one of the sources. Both files are
    complete before either is moved into place, so an error leaves the old files.
    """
    tensor_slots = list(slots(model))
    destinations = [
        [_destination(s, t, None if data_name is None else inline_below, None) for t in s.tensors]
        for s in tensor_slots
    ]
    _check_inline(path, tensor_slots, destinations)
    if data_name is None or not any(home is _Destination.MOVES for row in destinations for home in row):
        with atomic_path(path) as temporary:
            temporary.write_bytes(_serialize(model, tensor_slots, _placed(tensor_slots, destinations, None)))
        return [path]
    data = _data_path(path, data_name)
    if data.exists() and any(data.samefile(source) for source in external_files(model)):
        raise BuildError(
            f"{data} cannot be overwritten, the model reads its weights from it: choose another file."
        )
    with atomic_path(path) as temporary, atomic_path(data) as temporary_data:
        with temporary_data.open("r+b", buffering=0) as file:
            placed = _placed(tensor_slots, destinations, DataFile(file.fileno(), data, progress))
        temporary.write_bytes(_serialize(model, tensor_slots, placed))
    return [path, data]


def append_graph(
    model: ir.Model,
    path: Path,
    data: Path,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
) -> int:
    """Write ``model`` to ``path``, appending its new weights to ``data`` next to it; returns the bytes appended.

    External tensors of a model loaded from that folder stay where they are; all others of at least ``INLINE_BYTES``
    are appended. The data file is on disk before the new ``path`` replaces the old one, so a crash at any moment leaves
    a valid graph (bytes after the last tensor are harmless). An error restores the old length of the data file.
    ``check`` receives the complete new graph, next to its data under a temporary name, and raises to refuse it.

    Raises :class:`InputError` for a source that :func:`source_file` refuses, and :class:`BuildError` if ``data`` is a
    link or not a file, is in another folder or locked by another process, or if ``path`` would exceed 2 GiB.
    """
    folder = path.parent.resolve()
    if data.parent.resolve() != folder:
        raise BuildError(
            f"{data} is not in the folder of {path}, as external data must be: name a file there."
        )
    tensor_slots = list(slots(model))
    destinations = [[_destination(s, t, INLINE_BYTES, folder) for t in s.tensors] for s in tensor_slots]
    _check_inline(path, tensor_slots, destinations)
    with _appending(path, _data_path(path, data.name)) as target, atomic_path(path) as temporary:
        out = DataFile(target, data, progress)
        before = out.end
        blob = _serialize(model, tensor_slots, _placed(tensor_slots, destinations, out))
        os.fsync(target)
        sync(folder)
        temporary.write_bytes(blob)
        if check is not None:
            check(temporary)
    return out.end - before


def write_beside(
    model: ir.Model,
    path: Path,
    data_name: str,
    check: Callable[[Path], object],
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``model`` to ``path``; weights that are read from its folder stay, others go to a new file ``data_name``.

    Returns the files written. ``check`` receives the complete new graph under a temporary name, with its data under
    another, and raises to refuse it: then the old files stay. No kill leaves the old graph with the new data. The
    errors are those of :func:`write_graph`.
    """
    folder, data = path.parent.resolve(), _data_path(path, data_name)
    tensor_slots = list(slots(model))
    destinations = [[_destination(s, t, INLINE_BYTES, folder) for t in s.tensors] for s in tensor_slots]
    _check_inline(path, tensor_slots, destinations)
    moves = any(home is _Destination.MOVES for row in destinations for home in row)
    with atomic_path(path) as temporary, atomic_path(data) if moves else nullcontext(data) as new:
        with new.open("r+b", buffering=0) if moves else nullcontext() as file:
            out = DataFile(file.fileno(), new, progress) if file else None
            placed = _placed(tensor_slots, destinations, out)
        temporary.write_bytes(_serialize(model, tensor_slots, placed))
        check(temporary)
        final = [[_renamed(tensor, new, data) for tensor in row] for row in placed]
        temporary.write_bytes(_serialize(model, tensor_slots, final))
        if data.exists():
            path.unlink(missing_ok=True)
            sync(folder)
            if not moves:
                data.unlink()
    return [path, data] if moves else [path]


def _renamed(tensor: ir.TensorProtocol, before: Path, after: Path) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location) == Path(before.name):
        return reference(tensor, after.parent, after.name, tensor.offset or 0)
    return tensor


def _destination(
    slot: Slot, tensor: ir.TensorProtocol, least: int | None, folder: Path | None
) -> _Destination:
    # A tensor below ``least`` bytes is stored inline (with None: any tensor); one in ``folder`` stays there.
    external = isinstance(tensor, ir.ExternalTensor)
    if isinstance(tensor, ir.ExternalTensor):
        source_file(slot.where, tensor)
        if folder is not None and Path(tensor.base_dir or ".").resolve() == folder:
            return _Destination.STAYS
    if least is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < max(least, 1):
        return _Destination.INLINE
    # An attribute in memory was read from a protobuf, so it fits into one.
    return _Destination.MOVES if external or slot.attribute is None else _Destination.INLINE


def _placed(
    tensor_slots: list[Slot], destinations: list[list[_Destination]], out: DataFile | None
) -> list[list[ir.TensorProtocol]]:
    """The tensors of the new .onnx file; those that are moved are written to ``out``."""

    def place(slot: Slot, tensor: ir.TensorProtocol, home: _Destination) -> ir.TensorProtocol:
        if out is not None and home is _Destination.MOVES:
            return out.add(slot.where, tensor)
        if home is _Destination.STAYS or not isinstance(tensor, ir.ExternalTensor):
            return tensor
        return _inlined(slot.where, tensor)

    return [
        [place(s, t, home) for t, home in zip(s.tensors, row, strict=True)]
        for s, row in zip(tensor_slots, destinations, strict=True)
    ]


def _inlined(where: str, tensor: ir.ExternalTensor) -> ir.LazyTensor:
    """``tensor`` as a lazy tensor that is read when the protobuf is serialized, and not cached."""

    def read() -> ir.TensorProtocol:
        import onnx

        proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=tensor.shape.numpy())
        proto.raw_data = read_bytes(where, tensor)
        return ir.serde.deserialize_tensor(proto)

    return ir.LazyTensor(
        read,
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _check_inline(path: Path, tensor_slots: list[Slot], destinations: list[list[_Destination]]) -> None:
    total = sum(
        tensor.nbytes
        for slot, row in zip(tensor_slots, destinations, strict=True)
        for tensor, home in zip(slot.tensors, row, strict=True)
        if home is _Destination.INLINE
    )
    if total > PROTOBUF_BYTES:
        raise BuildError(
            f"{path} would contain {total:,} bytes of weights, more than the {PROTOBUF_BYTES:,} of a protobuf: "
            "write them to an external data file."
        )


def _serialize(model: ir.Model, tensor_slots: list[Slot], placed: list[list[ir.TensorProtocol]]) -> bytes:
    # Serialization also renames each initializer's tensor to the initializer's name.
    names = [(tensor, tensor.name) for slot in tensor_slots for tensor in slot.tensors]
    try:
        for slot, tensors in zip(tensor_slots, placed, strict=True):
            slot.put(tensors)
        blob: bytes = ir.serde.serialize_model(model).SerializeToString()
        return blob
    except ir.serde.SerdeError as error:
        # Reading a lazy tensor may have failed; raise that error itself.
        raise _first_cause(error) from None
    finally:
        for slot in tensor_slots:
            slot.restore()
        for tensor, name in names:
            if tensor.name != name:
                tensor.name = name


def _first_cause(error: Exception) -> Exception:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NblError | OSError):
            return cause
        cause = cause.__cause__
    return error


def _data_path(path: Path, name: str) -> Path:
    """The path of the data file ``name`` next to ``path``; an existing one must be a regular file, not a link."""
    if name in {"", "..", path.name} or Path(name).name != name:
        raise BuildError(f"{name!r} cannot be the data file of {path}: it must be another plain file name.")
    data = path.with_name(name)
    _check_file(data)
    return data


def _check_file(data: Path) -> None:
    if data.is_symlink() or (data.exists() and not data.is_file()):
        raise BuildError(f"{data} is a link or not a file, so nothing is written to it: remove it first.")


def check_own(data: Path) -> None:
    """Raise :class:`BuildError` for a data file that cannot be appended to: a link, or a file with a second name."""
    _check_file(data)
    if data.exists() and data.stat().st_nlink > 1:
        raise BuildError(
            f"{data} is a hard link, and its other names would change with it: copy the folder with `cp -r`, and use "
            "the copy."
        )


@contextmanager
def _appending(path: Path, data: Path) -> Iterator[int]:
    """``data`` opened for appending; an error before ``path`` is replaced restores its old length."""
    import fcntl

    check_own(data)
    replaced_from, new = _identity(path), not data.exists()
    target = os.open(data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"Another process is writing to {data}: wait for it, then start again."
            ) from None
        old_size = os.fstat(target).st_size
        try:
            yield target
        except BaseException:
            # After an interrupt that arrives after the replacement, the new graph needs these bytes.
            if _identity(path) == replaced_from:
                with suppress(OSError):
                    os.ftruncate(target, old_size)
                    if new:
                        data.unlink()
            raise
    finally:
        os.close(target)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
