"""Compute intermediate tensors of a graph, one partition after the other, also if the model exceeds memory.

    feeds ─► partition 1 ─► live tensors ─► partition 2 ─► …        each partition: up to 128 MiB of weights

Only the nodes that the wanted tensors depend on are run, and none upstream of a tensor that is fed. Each partition
is a separate onnxruntime session, which reads its weights from the data files of the full graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import MASK, POSITIONS, TOKENS, WRITE_INDICES, Inputs, left_padded, prefix_padded
from nbl_export.errors import InputError
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import INLINE_BYTES, DataFile, external_files, follow_links
from nbl_export.graph.operators import captured
from nbl_export.graph.rounding import HALF, compute_in_float32, float32_name, needs_emulation
from nbl_export.runtime.session import (
    data_folder,
    frugal,
    lend,
    load,
    require_onnxruntime,
    run_session,
    session_options,
)

Arrays = dict[str, NDArray[Any]]
PARTITION_BYTES = 128 << 20
_LENT = (*HALF, ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8)
_LENT_FROM = 1 << 16  # bytes; shape inference looks at the numbers of small tensors


class _Partition:
    """Nodes that run in one session, the tensors they read from other partitions, and those they write."""

    def __init__(self) -> None:
        self.nodes: dict[ir.Node, None] = {}
        self.weights: dict[str, ir.Value] = {}
        self.reads: set[str] = set()
        self.writes: set[str] = set()

    def weight_bytes(self, more: Iterable[ir.Value]) -> int:
        """Bytes of this partition's weights plus ``more``."""
        weights = {**self.weights, **{str(v.name): v for v in more}}
        return sum(v.const_value.nbytes for v in weights.values() if v.const_value is not None)


def compute_tensors(
    model: ir.Model,
    wanted: Sequence[str],
    rows: Sequence[Mapping[str, NDArray[Any]]],
    partition_bytes: int = PARTITION_BYTES,
    progress: Callable[[int], object] = lambda _bytes: None,
    scratch: Path | None = None,
) -> list[Arrays]:
    """The tensors ``wanted`` of ``model`` for each of ``rows``, which name its inputs.

    A row may also feed intermediate tensors; the nodes they depend on are then not run. Half-precision tensors are
    returned as float32, computed by emulation (:mod:`nbl_export.graph.rounding`). ``model`` is changed in
    place. ``progress`` receives the bytes of the weights of each partition that has run. In the folder ``scratch`` the
    weights of a partition are written that are in no file yet, as those of a graph that was just traced; then no weight
    of ``model`` may be in one. Raises :class:`InputError` if onnxruntime does not load a partition.
    """
    folder = follow_links(model) if scratch is None else scratch
    tapped = {name: name for name in wanted}
    if needs_emulation(model):
        compute_in_float32(model)
        made = {v.name for node in model.graph for v in node.outputs}
        tapped = {name: wide if (wide := float32_name(name)) in made else name for name in wanted}
    values: list[Arrays] = [dict(row) for row in rows]
    partitions = list(_partitions(model, set(tapped.values()), set(values[0]), partition_bytes))
    for index, partition in enumerate(partitions):
        later = set(tapped.values()).union(*(p.reads for p in partitions[index + 1 :]))
        outputs = sorted(partition.writes & later)
        _run(model, folder, partition, values, outputs, scratch)
        for row in values:
            for name in [n for n in row if n not in later]:
                del row[name]
        progress(partition.weight_bytes([]))
    return [{name: row[tap] for name, tap in tapped.items()} for row in values]


def _run(
    model: ir.Model,
    folder: Path | None,
    partition: _Partition,
    values: Sequence[Arrays],
    outputs: Sequence[str],
    scratch: Path | None,
) -> None:
    """Add ``outputs`` of the ``partition`` to ``values``, the tensors of each row."""
    feeds = {name: values[0][name] for name in sorted(partition.reads)}
    with ExitStack() as stack:
        weights = stack.enter_context(_weights(partition, scratch))
        # A weight in memory is lent to the session: written into the graph, it would be copied several times.
        lent = {name: tensor.numpy() for name, tensor in weights.items() if _is_lent(tensor)}
        file = ""  # which must exist and is not read: a graph says of a weight that is lent that it is there
        if lent and folder:
            file = str(external_files(model)[0].relative_to(folder))
        elif lent:
            folder, file = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbl-export."))),
                "none",
            )
            (folder / file).touch()
        proto = _proto(model, partition, weights, feeds, outputs, dict.fromkeys(lent, file))
        options = frugal(session_options(data_folder(folder)))
        kept = lend(options, lent)
        if lent:
            # onnxruntime's optimizers look for the numbers of a weight in the file that it is said to be in.
            options.graph_optimization_level = require_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        session = load(proto.SerializeToString(), options, "the graph", folded=False)
        for row in values:
            found = run_session(session, outputs, {name: row[name] for name in partition.reads})
            row |= dict(zip(outputs, found, strict=True))
        del session, kept, lent


def _is_lent(tensor: ir.TensorProtocol) -> bool:
    in_file = isinstance(tensor, ir.ExternalTensor)
    return not in_file and tensor.dtype in _LENT and tensor.nbytes >= _LENT_FROM


def _partitions(model: ir.Model, wanted: set[str], fed: set[str], limit: int) -> Iterator[_Partition]:
    needed = _needed(model, wanted - fed, fed)
    made = {str(v.name) for node in needed for v in node.outputs if v.name}
    constant = _constants(model, fed)
    partition = _Partition()
    for node in _with_casts(n for n in model.graph if n in needed):
        if node in constant and not any(v.name in wanted for v in node.outputs):
            continue  # repeated in every partition that reads it: passing on converted weights would cost memory
        group = [*_constants_before(node, constant), node]
        weights = [v for n in group for v in _reads(n) if v.is_initializer() and v.name not in fed]
        # A node without weights stays: it may be the Cast of what is in half precision, which cannot be passed on.
        if partition.nodes and weights and partition.weight_bytes(weights) > limit:
            yield partition
            partition = _Partition()
        for member in group:
            partition.nodes[member] = None
            names = {str(v.name) for v in _reads(member) if not v.is_initializer() or v.name in fed}
            partition.reads |= {n for n in names - partition.writes if n in fed or n in made}
            partition.writes |= {str(v.name) for v in member.outputs if v.name and v.name not in fed}
        partition.weights |= {str(v.name): v for v in weights}
    if partition.nodes:
        yield partition


def _constants(model: ir.Model, fed: set[str]) -> dict[ir.Node, int]:
    """The nodes that depend on weights only, and their places in the graph."""
    found: dict[ir.Node, int] = {}
    for place, node in enumerate(model.graph):
        reads = _reads(node)
        if all(v.name not in fed and (v.is_initializer() or v.producer() in found) for v in reads):
            found[node] = place
    return found


def _constants_before(node: ir.Node, constant: Mapping[ir.Node, int]) -> list[ir.Node]:
    """The constant nodes that ``node`` depends on, in order."""
    found: set[ir.Node] = set()
    stack = [node]
    while stack:
        makers = {maker for v in _reads(stack.pop()) if (maker := v.producer()) in constant} - found
        found |= makers  # type: ignore[arg-type]
        stack += makers  # type: ignore[arg-type]
    return sorted(found, key=constant.__getitem__)


def _with_casts(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """``nodes`` in order, each followed by the Casts of its half-precision outputs, which NumPy cannot pass on."""
    order = list(nodes)
    needed, done = set(order), set()
    for first in order:
        stack = [first]
        while stack:
            node = stack.pop()
            if node in done or node not in needed:
                continue
            done.add(node)
            yield node
            halves = [v for v in node.outputs if v.dtype in HALF]
            stack.extend(u.node for v in halves for u in v.uses() if u.node.op_type == "Cast")


def _reads(node: ir.Node) -> list[ir.Value]:
    return [v for v in (*node.inputs, *captured(node)) if v is not None]


def _needed(model: ir.Model, wanted: set[str], fed: set[str]) -> set[ir.Node]:
    by_name = {v.name: v for node in model.graph for v in node.outputs}
    inputs = {v.name for v in model.graph.inputs}
    if missing := [name for name in wanted if name not in by_name and name not in inputs]:
        raise InputError(f"The graph has no tensor {missing[0]!r}: check its name.")
    stack = [by_name[name] for name in wanted if name in by_name]
    needed: set[ir.Node] = set()
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or value.name in fed or node in needed:
            continue
        needed.add(node)
        stack.extend(_reads(node))
    return needed


@contextmanager
def _weights(partition: _Partition, scratch: Path | None) -> Iterator[dict[str, ir.TensorProtocol]]:
    """The weights of ``partition`` by name; in a file of ``scratch`` while they are needed."""
    weights = {n: v.const_value for n, v in partition.weights.items() if v.const_value is not None}
    if scratch is None:
        yield weights
        return
    path = scratch / "weights.data"
    try:
        with path.open("wb", buffering=0) as file:
            out = DataFile(file, path, None)
            for name, tensor in weights.items():
                if tensor.nbytes >= INLINE_BYTES and tensor.dtype != ir.DataType.STRING:
                    weights[name] = out.add(name, tensor)
        yield weights
    finally:
        path.unlink(missing_ok=True)


def _proto(
    model: ir.Model,
    partition: _Partition,
    weights: Mapping[str, ir.TensorProtocol],
    feeds: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    lent: Mapping[str, str],
) -> onnx.ModelProto:
    """The graph of a partition; the weights ``lent`` are in the files named there, so to speak."""
    graph = onnx.GraphProto(name="partition")
    graph.node.extend(ir.serde.serialize_node(node) for node in partition.nodes)
    for node in graph.node:
        # A node may run for one output while another of its outputs is fed.
        node.output[:] = [f"{n} as computed" if n in feeds else n for n in node.output]
    for name, weight in weights.items():
        if name in lent:
            shape = ir.Shape(weight.shape.numpy())
            weight = ir.ExternalTensor(lent[name], 0, weight.nbytes, weight.dtype, shape=shape, name=name)
        tensor = ir.serde.serialize_tensor(weight)
        tensor.name = name
        graph.initializer.append(tensor)
    for name, array in feeds.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        # Only the rank is fixed: rows have different lengths.
        graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, [None] * array.ndim))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    imports = [onnx.OperatorSetIdProto(domain=k, version=v) for k, v in model.opset_imports.items()]
    functions = [ir.serde.serialize_function(f) for f in model.functions.values()]
    return onnx.ModelProto(
        ir_version=model.ir_version, graph=graph, opset_import=imports, functions=functions
    )


def batch_rows(model: ir.Model, rows: Sequence[NDArray[Any] | Inputs] | Inputs) -> list[Arrays]:
    """The feeds of :func:`compute_tensors` for ``rows`` padded to one batch, row by row; or for an encoder's batch.

    A row may be given by its embeddings and positions instead, and is then not padded.
    """
    interface = interface_of(model)
    if isinstance(rows, Mapping):
        return [interface.named(row) for row in _rows(rows)]
    text = [row for row in rows if not isinstance(row, Mapping)]
    found = [interface.row(row, np.float32) for row in rows if isinstance(row, Mapping)]
    if text:
        pad = prefix_padded if interface.static or interface.ragged else left_padded
        batch = dict(zip((TOKENS, MASK, POSITIONS), pad(text), strict=True))
        batch[WRITE_INDICES] = np.zeros(len(text), dtype=np.int64)
        past = interface.empty_cache(1, max(map(len, text)) if interface.static else 0, np.float32)
        found = [*(interface.named(row) | past for row in _rows(batch)), *found]
    return found


def _rows(batch: Inputs) -> list[dict[str, NDArray[Any]]]:
    """The rows of a ``batch``, each as a batch of one, with its padding."""
    count = len(next(iter(batch.values())))
    return [{name: array[i : i + 1] for name, array in batch.items()} for i in range(count)]


def prefill_rows(model: ir.Model, rows: Sequence[NDArray[Any] | Inputs]) -> list[Arrays]:
    """The feeds of :func:`compute_tensors` for each of ``rows``, token ids or named inputs; batch 1, no padding."""
    interface = interface_of(model)
    return [interface.row(row, np.float32) for row in rows]


def unbatched(value: NDArray[Any], length: int) -> NDArray[Any]:
    """The tensor [1, length, …] or [length, …] of one row as [length, …]."""
    return value[0] if value.ndim > 1 and value.shape[:2] == (1, length) else value
