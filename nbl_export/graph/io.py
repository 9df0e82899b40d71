"""Read and write ONNX files with external data, safely and atomically."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from nbl_export.errors import BuildError, InputError
from nbl_export.files import TEMPORARY, publish, sync
from nbl_export.graph.external_data import append_graph as append
from nbl_export.graph.external_data import write_beside, write_graph
from nbl_export.graph.operators import captured
from nbl_export.graph.summary import GraphSummary
from nbl_export.graph.tensors import (
    all_tensors,
    bytes_read_from,
    check_tensor,
    external_files,
    name_from,
    set_folder,
    source_file,
)

DATA_SUFFIX = ".data"
# onnx_ir's warnings are errors with a message here.
logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def load_graph(path: Path) -> ir.Model:
    """Open an ONNX file; weights stay on disk, memory-mapped.

    Raises :class:`InputError` if the file is not an ONNX file, if its graph is invalid (a duplicate name, a
    cycle, a tensor without a producer), or if its external data is missing, too short, or outside the
    file's own folder (a path outside the folder is never opened).
    """
    if not path.is_file():
        raise InputError(f"The ONNX file {path} does not exist.")
    try:
        model: ir.Model = ir.from_proto(onnx.load(path, load_external_data=False))
    except Exception as error:  # protobuf, UnicodeDecode, ValueError: whatever a broken file provokes
        raise InputError(f"{path} is not a readable ONNX file ({_cause(error)}): export it again.") from None
    if model.graph.num_nodes() == 0:
        raise InputError(f"{path} is not a usable ONNX file: its graph is empty; export it again.")
    _check_graph(path, model)
    set_folder(model, path.parent)
    try:
        for where, tensor in all_tensors(model):
            check_tensor(where, tensor)
            if isinstance(tensor, ir.ExternalTensor):
                source_file(where, tensor)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return model


def _cause(error: BaseException) -> str:
    """The innermost exception in one line: parsers wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = (str(error).strip().splitlines() or [""])[0]
    name = type(error).__name__
    return f"{name}: {first[:200]}" if first and first.isprintable() else name


def _check_graph(path: Path, model: ir.Model) -> None:
    graph = model.graph
    try:
        graph.sort()
    except ValueError:
        raise InputError(
            f"{path} is not a usable ONNX file: its nodes form a cycle; export it again."
        ) from None
    known = {*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)}
    for output in graph.outputs:
        if output not in known:
            raise InputError(
                f"{path} is not a usable ONNX file: no node writes its output {output.name}; export it again."
            )
    for node in graph:
        for value in (*node.inputs, *captured(node)):
            if value is not None and value not in known:
                raise InputError(
                    f"{path} is not a usable ONNX file: {node.op_type} ({node.name}) reads {value.name}, which no "
                    "node writes; export it again."
                )


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
    check: Callable[[Path], object] = check_file,
    progress: Callable[[int], object] | None = None,
    readers: Sequence[Path] = (),
    data_name: str = "",
) -> list[Path]:
    """Write ``model`` to ``path``, with one external data file next to it; returns the files.

    The data file is called ``data_name``; without one it keeps its name if the model has exactly one. Both files are
    written to a temporary folder and moved into place after ``check`` has accepted them there (it raises otherwise), so
    a failed check, a full disk or an interrupt leaves the old files. ``progress`` receives the bytes written.
    ``readers`` are other graphs that read the data file: they are deleted before it is replaced.
    """
    path.parent.mkdir(exist_ok=True)
    data = path.with_name(data_name or _data_name(model, path))
    temporary = Path(tempfile.mkdtemp(prefix=".onnx.", suffix=TEMPORARY, dir=path.parent))
    try:
        written = write_graph(model, temporary / path.name, data.name, progress=progress)
        check(temporary / path.name)
        if data.exists():
            # No kill leaves the old graph with the new data: it would load, and compute something else.
            delete_graphs((path, *readers))
        if len(written) > 1:
            publish(written[1], data)
        else:
            data.unlink(missing_ok=True)
        publish(written[0], path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [p for p in (path, data) if p.exists()]


def save_beside(
    model: ir.Model,
    path: Path,
    check: Callable[[Path], object] = check_file,
    progress: Callable[[int], object] | None = None,
    data: str = "",
) -> list[Path]:
    """Write ``model`` to ``path``; weights in folders below stay where they are, a data file next to it has the others.

    Returns the files written; the data file's name is ``data``, or as usual. ``check`` and ``progress`` are as in
    :func:`save_graph`.
    """
    path.parent.mkdir(exist_ok=True)
    name_from(model, path.parent)
    return write_beside(model, path, data or path.name + DATA_SUFFIX, check, progress)


def delete_graphs(graphs: Iterable[Path]) -> None:
    """Delete ``graphs``, durably, before the data that they read is replaced."""
    for graph in graphs:
        if graph.exists():
            graph.unlink()
            sync(graph.parent)


def _data_name(model: ir.Model, path: Path) -> str:
    files = external_files(model)
    return files[0].name if len(files) == 1 and files[0].name != path.name else path.name + DATA_SUFFIX


def append_graph(
    model: ir.Model,
    path: Path,
    check: Callable[[Path], object] = check_file,
    progress: Callable[[int], object] | None = None,
    data: Path | None = None,
) -> list[Path]:
    """Overwrite ``path`` with ``model``, which was read from it; weights stay in place, new ones are appended.

    Returns the files. ``check`` and ``progress`` are as in :func:`save_graph`; the old graph is replaced only
    after the new one is accepted. ``data`` is the file to append to, usually :func:`appended_file`.
    """
    append(model, path, data or appended_file(model, path), progress, check)
    return [path, *external_files(load_graph(path))]


def appended_file(model: ir.Model, path: Path) -> Path:
    """The file that new weights of ``model``, the graph at ``path``, are appended to: its last one in that folder."""
    folder = path.parent.resolve()
    beside = [file.name for file in external_files(model) if file.parent.resolve() == folder]
    return path.with_name(beside[-1] if beside else path.name + DATA_SUFFIX)


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


def summarize(model: ir.Model, path: Path) -> GraphSummary:
    """Counts of ``model`` as stored at ``path``."""
    from nbl_export.graph.cache import kv_bytes_per_token, kv_pairs

    graph = model.graph
    ops = Counter(node.op_type for node in graph)
    return GraphSummary(
        nodes=sum(ops.values()),
        ops=dict(ops.most_common()),
        inputs=len(graph.inputs),
        outputs=len(graph.outputs),
        kv_pairs=len(kv_pairs(model)),
        kv_bytes_per_token=kv_bytes_per_token(model),
        initializers=len(graph.initializers),
        parameters=sum(v.const_value.size for v in graph.initializers.values() if v.const_value is not None),
        file_bytes=sum(_size(model, f, f.parent == path.parent) for f in [path, *external_files(model)]),
    )


def _size(model: ir.Model, file: Path, own: bool) -> int:
    """The bytes of ``file``; where it is not the graph's ``own``, of what the graph reads of it."""
    if not file.exists():
        return 0
    return file.stat().st_size if own else bytes_read_from(model, file)
