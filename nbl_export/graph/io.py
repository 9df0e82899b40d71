"""Read and write ONNX files with external data, safely and atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.errors import BuildError, InputError
from nbl_export.workspace import TEMPORARY

DATA_SUFFIX = ".data"
# Tensors smaller than this stay inside the .onnx file, so that shape inference sees shape constants.
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class GraphSummary:
    """What a before/after table shows: counts, and bytes on disk of graph and external data."""

    nodes: int
    ops: dict[str, int]
    inputs: int
    outputs: int
    kv_pairs: int
    kv_bytes_per_token: int
    initializers: int
    parameters: int
    file_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def load_graph(path: Path) -> ir.Model:
    """Open an ONNX file; weights stay on disk, memory-mapped.

    Raises :class:`InputError` if the file is no ONNX, or if its external data is missing, too short,
    or lies outside the file's own folder (a path that leaves the folder is never opened).
    """
    if not path.is_file():
        raise InputError(f"The ONNX file {path} does not exist.")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, UnicodeDecode, ValueError: whatever a broken file provokes
        raise InputError(
            f"{path} is no readable ONNX file ({type(error).__name__}): export it again."
        ) from None
    if model.graph.num_nodes() == 0:
        raise InputError(f"{path} is no usable ONNX file: its graph is empty; export it again.")
    folder = path.parent.resolve()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_external(path, folder, value.const_value)
    return model


def _check_external(path: Path, folder: Path, tensor: ir.ExternalTensor) -> None:
    location = Path(tensor.location)
    target = (folder / location).resolve()
    if location.is_absolute() or not target.is_relative_to(folder):
        raise InputError(
            f"{path}: the external data of {tensor.name} lies outside its folder ({location}); refused."
        )
    if not target.is_file():
        raise InputError(f"{path}: its external data {location} is missing; put the file beside it.")
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes:
        raise InputError(f"{path}: {tensor.name} has {tensor.nbytes:,} bytes, its external data {length:,}.")
    end = offset + length
    if offset < 0 or end > target.stat().st_size:
        raise InputError(
            f"{target} is truncated: {tensor.name} ends at byte {end:,}, the file has "
            f"{target.stat().st_size:,}; export it again."
        )


def check_file(path: Path) -> None:
    """Run the ONNX checker and strict shape inference on a written file; raises :class:`BuildError`."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
        # Shapes need no weights: leave the external data where it is.
        proto = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except Exception as error:
        raise BuildError(f"{path} does not pass the ONNX checker: {str(error).splitlines()[0]}") from error


def save_graph(model: ir.Model, path: Path, check: Callable[[Path], object] = check_file) -> list[Path]:
    """Write ``model`` to ``path`` with one external data file beside it; returns both paths.

    Both are written to a temporary folder first and moved into place when ``check`` has accepted them
    there (it raises if not), so a refusal, a full disk or an interrupt leaves what was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + DATA_SUFFIX)
    temporary = Path(tempfile.mkdtemp(prefix=".onnx.", suffix=TEMPORARY, dir=path.parent))
    try:
        ir.save(model, temporary / path.name, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
        check(temporary / path.name)
        written = temporary / data.name
        if written.exists() and written.stat().st_size:
            written.replace(data)
        else:
            data.unlink(missing_ok=True)
        (temporary / path.name).replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [p for p in (path, data) if p.exists()]


@contextmanager
def scratch_copy(path: Path, change: Callable[[ir.Model], object]) -> Iterator[Path]:
    """A temporary, changed copy of the graph at ``path``, beside it and sharing its data file."""
    model = load_graph(path)
    change(model)
    handle, temporary = tempfile.mkstemp(prefix=".scratch.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    try:
        ir.save(model, temporary, format="protobuf")  # external tensors keep their location
        yield Path(temporary)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def with_outputs(path: Path, names: list[str]) -> Iterator[Path]:
    """A temporary copy of the graph at ``path`` with extra outputs ``names``."""

    def add(model: ir.Model) -> None:
        graph = model.graph
        values = {v.name: v for node in graph for v in node.outputs if v.name}
        if missing := [n for n in names if n not in values]:
            raise InputError(f"{path} has no tensor {missing[0]!r}: it was changed after it was written.")
        present = {v.name for v in graph.outputs}
        for name in dict.fromkeys(names):
            if name not in present:
                value = values[name]
                if value.type is None:
                    value.type = ir.TensorType(ir.DataType.FLOAT)
                graph.outputs.append(value)

    with scratch_copy(path, add) as copy:
        yield copy


def summarize(model: ir.Model, path: Path) -> GraphSummary:
    """Counts of ``model`` as stored at ``path``."""
    from nbl_export.graph.cache import kv_bytes_per_token, kv_pairs

    graph = model.graph
    ops = Counter(node.op_type for node in graph)
    files = [path, path.with_name(path.name + DATA_SUFFIX)]
    return GraphSummary(
        nodes=sum(ops.values()),
        ops=dict(ops.most_common()),
        inputs=len(graph.inputs),
        outputs=len(graph.outputs),
        kv_pairs=len(kv_pairs(model)),
        kv_bytes_per_token=kv_bytes_per_token(model),
        initializers=len(graph.initializers),
        parameters=sum(v.const_value.size for v in graph.initializers.values() if v.const_value is not None),
        file_bytes=sum(f.stat().st_size for f in files if f.exists()),
    )
