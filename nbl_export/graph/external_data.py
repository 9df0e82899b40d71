"""Write a model's weights from file to file, without ever holding them in memory.

A tensor that lies in an external data file is copied from byte range to byte range by the kernel, never
through a memory map: mapped pages count as resident, and an 8B model has 16 GB of them. Tensors in memory
are written one after another. Two ways to store a model:

    write_graph    a new .onnx file and one new data file with every weight
    append_graph   a new .onnx file over the old one; weights stay where they are, new ones are appended

Both leave the model object as it was: while the protobuf is made, its tensors are replaced by references
to the new file, then put back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path

import onnx_ir as ir

from nbl_export.errors import BuildError, InputError, NblError
from nbl_export.files import atomic_path
from nbl_export.graph.tensors import Slot, all_tensors, external_files, set_folder, slots, source_file

__all__ = [
    "INLINE_BYTES",
    "all_tensors",
    "append_graph",
    "external_files",
    "set_folder",
    "source_file",
    "write_graph",
]

Progress = Callable[[int], object]

# Tensors smaller than this stay inside the .onnx file, so that shape inference sees shape constants.
INLINE_BYTES = 1024
# The ONNX specification recommends page-aligned offsets, so that a reader can map a tensor by itself.
_PAGE, _PAGE_FROM, _ALIGNED = 4096, 64 << 10, 64
# Small enough for an interrupt and a progress bar, large enough for full speed.
_KERNEL_BLOCK, _BLOCK = 64 << 20, 8 << 20
# What says that these two files cannot be copied inside the kernel, not that the copy failed.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
# protobuf stops at 2 GiB; the slack is for the nodes and names around the tensors.
PROTOBUF_BYTES = (1 << 31) - (64 << 20)


class _Home(Enum):
    """Where a tensor goes: into the .onnx file, into the data file, or nowhere since it lies there."""

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
    """Write ``model`` to ``path`` and its weights to the file ``data_name`` beside it; returns both paths.

    Initializers of at least ``inline_below`` bytes, and attributes of that size that are external already,
    go to the data file; a byte range that several tensors share is stored once. With ``data_name`` None, or
    if every tensor is smaller, all are inside ``path``, and no data file is made. ``progress`` is told the
    bytes written by each step.

    Raises :class:`InputError` for a source that :func:`source_file` refuses, and :class:`BuildError` if
    the tensors inside ``path`` pass protobuf's 2 GiB or if the data file is one of the sources. Both files
    are complete before either is put in place, so an error leaves what was there.
    """
    places = list(slots(model))
    homes = [
        [_home(s, t, None if data_name is None else inline_below, None) for t in s.tensors] for s in places
    ]
    _check_inline(path, places, homes)
    if data_name is None or not any(home is _Home.MOVES for row in homes for home in row):
        with atomic_path(path) as temporary:
            temporary.write_bytes(_serialize(model, places, _placed(places, homes, None)))
        return [path]
    data = _beside(path, data_name)
    if data.exists() and any(data.samefile(source) for source in external_files(model)):
        raise BuildError(f"{data} cannot be overwritten, the model reads its weights there: write elsewhere.")
    with atomic_path(path) as temporary, atomic_path(data) as temporary_data:
        with temporary_data.open("r+b", buffering=0) as file:
            placed = _placed(places, homes, _DataFile(file.fileno(), data, progress))
        temporary.write_bytes(_serialize(model, places, placed))
    return [path, data]


def append_graph(
    model: ir.Model,
    path: Path,
    data: Path,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
) -> int:
    """Write ``model`` to ``path``, appending its new weights to ``data`` beside it; returns the bytes appended.

    External tensors of a model that was loaded from that folder stay where they are; all others of at least
    ``INLINE_BYTES`` are appended. The data file is on disk before the new ``path`` replaces the old one, so
    a crash at any moment leaves a valid graph (bytes behind the last tensor do no harm), and an error
    gives the data file its old length. ``check`` is given the complete new graph, beside its data under a
    temporary name, and raises to refuse it.

    Raises :class:`InputError` for a source that :func:`source_file` refuses, and :class:`BuildError` if
    ``data`` is a link or no file, lies elsewhere or is being appended to by another process, or if
    ``path`` would pass protobuf's 2 GiB.
    """
    folder = path.parent.resolve()
    if data.parent.resolve() != folder:
        raise BuildError(f"{data} does not lie beside {path}, where a graph has its data: name a file there.")
    places = list(slots(model))
    homes = [[_home(s, t, INLINE_BYTES, folder) for t in s.tensors] for s in places]
    _check_inline(path, places, homes)
    with _appending(path, _beside(path, data.name)) as target, atomic_path(path) as temporary:
        out = _DataFile(target, data, progress)
        before = out.end
        blob = _serialize(model, places, _placed(places, homes, out))
        os.fsync(target)
        _sync_folder(folder)
        with temporary.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
    _sync_folder(folder)
    return out.end - before


def _home(slot: Slot, tensor: ir.TensorProtocol, least: int | None, folder: Path | None) -> _Home:
    # A tensor below ``least`` bytes goes inside, with None any; one that lies in ``folder`` stays.
    external = isinstance(tensor, ir.ExternalTensor)
    if isinstance(tensor, ir.ExternalTensor):
        source_file(slot.where, tensor)
        if folder is not None and Path(tensor.base_dir or ".").resolve() == folder:
            return _Home.STAYS
    if least is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < max(least, 1):
        return _Home.INLINE
    # An attribute in memory came from inside a protobuf and fits there again.
    return _Home.MOVES if external or slot.attribute is None else _Home.INLINE


def _placed(
    places: list[Slot], homes: list[list[_Home]], out: _DataFile | None
) -> list[list[ir.TensorProtocol]]:
    """What stands for each tensor in the new .onnx file; those that move are written to ``out``."""

    def place(slot: Slot, tensor: ir.TensorProtocol, home: _Home) -> ir.TensorProtocol:
        if out is not None and home is _Home.MOVES:
            return out.add(slot.where, tensor)
        if home is _Home.STAYS or not isinstance(tensor, ir.ExternalTensor):
            return tensor
        return _inlined(slot.where, tensor)

    return [
        [place(s, t, home) for t, home in zip(s.tensors, row, strict=True)]
        for s, row in zip(places, homes, strict=True)
    ]


def _reference(tensor: ir.TensorProtocol, folder: Path, location: str, offset: int) -> ir.ExternalTensor:
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


def _inlined(where: str, tensor: ir.ExternalTensor) -> ir.LazyTensor:
    """``tensor`` as one that is read when the protobuf is made, and then forgotten."""

    def read() -> ir.TensorProtocol:
        import onnx

        proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=tensor.shape.numpy())
        proto.raw_data = _read(where, tensor)
        return ir.serde.deserialize_tensor(proto)

    return ir.LazyTensor(
        read,
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _check_inline(path: Path, places: list[Slot], homes: list[list[_Home]]) -> None:
    total = sum(
        tensor.nbytes
        for slot, row in zip(places, homes, strict=True)
        for tensor, home in zip(slot.tensors, row, strict=True)
        if home is _Home.INLINE
    )
    if total > PROTOBUF_BYTES:
        raise BuildError(
            f"{path} would hold {total:,} bytes of weights, where a protobuf takes {PROTOBUF_BYTES:,}: "
            "write them to an external data file."
        )


def _serialize(model: ir.Model, places: list[Slot], placed: list[list[ir.TensorProtocol]]) -> bytes:
    # Serializing also gives each initializer's tensor the initializer's name.
    names = [(tensor, tensor.name) for slot in places for tensor in slot.tensors]
    try:
        for slot, tensors in zip(places, placed, strict=True):
            slot.put(tensors)
        blob: bytes = ir.serde.serialize_model(model).SerializeToString()
        return blob
    except ir.serde.SerdeError as error:
        # A tensor that is read on the way may fail on its own account.
        raise _first_cause(error) from None
    finally:
        for slot in places:
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


# files --------------------------------------------------------------------------------------------


class _DataFile:
    """The data file being written: tensors are added at its end, each distinct byte range once."""

    def __init__(self, descriptor: int, path: Path, progress: Progress | None) -> None:
        self._descriptor, self._path, self._progress = descriptor, path, progress
        self._offsets: dict[tuple[object, ...], int] = {}
        self.end = os.fstat(descriptor).st_size

    def add(self, where: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write ``tensor`` unless its bytes are there already; returns the reference to them."""
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
        return _reference(tensor, self._path.parent, self._path.name, self._offsets[key])

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
        raw = memoryview(tensor.tobytes())
        if len(raw) != tensor.nbytes:
            raise BuildError(
                f"{where} gives {len(raw):,} bytes, its type and shape say {tensor.nbytes:,}: "
                "correct what builds this tensor."
            )
        while raw:
            written = os.pwrite(self._descriptor, raw[:_BLOCK], self.end)
            raw = raw[written:]
            self._advance(written)

    def _advance(self, amount: int) -> None:
        self.end += amount
        if self._progress is not None:
            self._progress(amount)


def _copy_some(source: int, start: int, target: int, at: int, most: int) -> int:
    """Copy up to ``most`` bytes between two files; returns how many, 0 only at the end of ``source``."""
    if hasattr(os, "copy_file_range"):
        try:
            if copied := os.copy_file_range(source, target, min(most, _KERNEL_BLOCK), start, at):
                return copied
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    block = os.pread(source, min(most, _BLOCK), start)
    return os.pwrite(target, block, at) if block else 0


def _read(where: str, tensor: ir.ExternalTensor) -> bytes:
    raw = bytearray()
    with _opened(where, tensor) as source:
        while len(raw) < tensor.nbytes:
            block = os.pread(source, min(_BLOCK, tensor.nbytes - len(raw)), (tensor.offset or 0) + len(raw))
            if not block:
                raise _shrunk(where, tensor)
            raw += block
    return bytes(raw)


def _shrunk(where: str, tensor: ir.ExternalTensor) -> InputError:
    return InputError(f"{tensor.path} became shorter while {where} was read: let nothing else write to it.")


@contextmanager
def _opened(where: str, tensor: ir.ExternalTensor) -> Iterator[int]:
    descriptor = os.open(source_file(where, tensor), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _beside(path: Path, name: str) -> Path:
    """The data file ``name`` beside ``path``; what is there already must be a file of its own, no link."""
    if name in {"", "..", path.name} or Path(name).name != name:
        raise BuildError(f"{name!r} cannot be the data file of {path}: it must be another plain file name.")
    data = path.with_name(name)
    if data.is_symlink() or (data.exists() and not data.is_file()):
        raise BuildError(f"{data} is a link or no file, so nothing is written to it: remove it first.")
    return data


@contextmanager
def _appending(path: Path, data: Path) -> Iterator[int]:
    """``data`` opened to append to; an error before ``path`` is replaced gives it its old length."""
    import fcntl

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
            # An interrupt can arrive after the replacement: then the new graph needs these bytes.
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


def _sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
