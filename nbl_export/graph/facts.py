"""What a graph file says of itself: counts, types, inputs and outputs, linear layers; its weights if asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from nbl_export.blocks import grouped
from nbl_export.graph.cache import LAYERS_KEY, kv_bytes_per_token, kv_layers, kv_pairs, metadata_list
from nbl_export.graph.io import external_files, external_tensors, load_graph
from nbl_export.graph.summary import DescribedLayer, GraphFacts, GraphSummary, Stored

# By what everybody else calls them; the other dtypes have one name.
_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


def summarize(model: ir.Model, path: Path) -> GraphSummary:
    """Counts of ``model`` as stored at ``path``."""
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
    """The bytes of ``file``; where it is not the graph's ``own``, of what the graph reads of it, each once."""
    if not file.exists():
        return 0
    read = {(t.offset or 0, t.nbytes) for _, t in external_tensors(model) if Path(t.path) == file}
    return file.stat().st_size if own else sum(size for _, size in read)


def facts_of(path: Path, weights: bool = False) -> GraphFacts:
    """The facts of the ONNX file ``path``; of external data only the sizes of the files are looked at, and the
    ``weights`` if it is asked for.

    Raises :class:`InputError` for what :func:`.load_graph` refuses, and for metadata that nbl-export did not write.
    """
    model = load_graph(path)
    graph, pairs = model.graph, kv_pairs(model)
    past = {value for pair in pairs for value in pair.past}
    present = {value for pair in pairs for value in pair.present}
    described = metadata_list(model, LAYERS_KEY, DescribedLayer)
    return GraphFacts(
        summary=summarize(model, path),
        opsets={domain or "ai.onnx": version for domain, version in sorted(model.opset_imports.items())},
        initializers=_by_dtype(model),
        inputs=tuple(f"{v.name}: {_type(v)}" for v in graph.inputs if v not in past),
        outputs=tuple(f"{v.name}: {_type(v)}" for v in graph.outputs if v not in present),
        cache=_type(pairs[0].past[0]) if pairs else "none",
        kv_layers=kv_layers(model),
        linear=grouped(
            *([row.layer for row in described if row.kind == kind] for kind in ("linear", "dropped"))
        ),
        weights=_digest(model) if weights else "",
    )


def _digest(model: ir.Model) -> str:
    """Hex SHA-256 of the weights, by name."""
    found = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            found.update(name.encode())
            found.update(value.const_value.tobytes())
    return found.hexdigest()


def _by_dtype(model: ir.Model) -> dict[str, Stored]:
    sizes: dict[str, list[int]] = {}
    for tensor in (v.const_value for v in model.graph.initializers.values()):
        if tensor is not None:
            sizes.setdefault(_dtype(tensor.dtype), []).append(tensor.nbytes)
    return {name: Stored(len(own), sum(own)) for name, own in sorted(sizes.items())}


def _type(value: ir.Value) -> str:
    """As ``float32[batch, 4, past, 8]``; what the graph does not say is ``?``."""
    dtype = "?" if value.dtype is None else _dtype(value.dtype)
    sizes = (
        ["?"] if value.shape is None else [d if isinstance(d, int) else d.value or "?" for d in value.shape]
    )
    return f"{dtype}[{', '.join(map(str, sizes))}]"


def _dtype(dtype: ir.DataType) -> str:
    return _DTYPES.get(dtype.name, dtype.name.lower())
