"""Whether two graphs are the same program: operator by operator, weight by weight, whatever is fed to them.

A run on some tokens says nothing about others, nor about positions, batches and inputs that it does not have. Names of
nodes, their order, documentation, shapes of intermediate tensors and where a weight's bytes are stored do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.graph.tensors import follow_links, source_file

# The distance of 1 to the next number.
_EPSILON = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}


def difference(expected: ir.Model, found: ir.Model, metadata: tuple[str, ...] = ()) -> str:
    """The first thing in ``found`` that is not as in ``expected``, as the end of a sentence; empty if there is none.

    Every weight must be the same bit for bit, but those that ``expected`` computes as they are read, in floating point:
    these may be off by the order of additions. ``metadata`` are the keys of metadata that count. Links of external data
    are resolved in both, in place.
    """
    follow_links(expected)
    follow_links(found)
    return next(_differences(expected, found, metadata), "")


def _differences(expected: ir.Model, found: ir.Model, metadata: tuple[str, ...]) -> Iterator[str]:
    a, b = expected.graph, found.graph
    for key in metadata:
        if expected.metadata_props.get(key) != found.metadata_props.get(key):
            yield f"its metadata {key} is another"
    if dict(expected.opset_imports) != dict(found.opset_imports):
        yield "its opset is another"
    yield from _of_functions(expected, found)
    for what, ours, theirs in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs)):
        if [(v.name, v.dtype) for v in ours] != [(v.name, v.dtype) for v in theirs]:
            yield f"its {what} are others"
    yield from _of_nodes(a, b)
    yield from _of_weights(a, b)


def _of_functions(expected: ir.Model, found: ir.Model) -> Iterator[str]:
    ours, theirs = (
        {key: ir.serde.serialize_function(f).SerializeToString() for key, f in model.functions.items()}
        for model in (expected, found)
    )
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            yield f"its function {key[1]} is another"


def _of_nodes(expected: ir.Graph, found: ir.Graph) -> Iterator[str]:
    ours, theirs = ({_written(node): node for node in graph} for graph in (expected, found))
    for written in chain(ours, (w for w in theirs if w not in ours)):
        a, b = ours.get(written), theirs.get(written)
        name = next((w for w in written if w), "nothing")
        if a is None:
            yield f"it has another {b.op_type if b else ''} that writes {name}"
        elif b is None:
            yield f"it lacks the {a.op_type} that writes {name}"
        elif a.op_identifier() != b.op_identifier():
            yield f"{name} is written by {b.op_type} instead of {a.op_type}"
        elif [v and v.name for v in a.inputs] != [v and v.name for v in b.inputs]:
            yield f"the {a.op_type} that writes {name} reads other tensors"
        elif attribute := _other_attribute(a.attributes, b.attributes):
            yield f"the {a.op_type} that writes {name} has another {attribute}"
    if sum(1 for _ in found) > len(theirs):
        yield "two of its nodes write the same tensors"


def _written(node: ir.Node) -> tuple[str | None, ...]:
    return tuple(v.name for v in node.outputs)


def _other_attribute(a: Mapping[str, ir.Attr], b: Mapping[str, ir.Attr]) -> str:
    """The name of the first attribute that differs."""
    for name in sorted({*a, *b}):
        one, other = a.get(name), b.get(name)
        if one is None or other is None or one.type != other.type:
            return name
        if one.type == ir.AttributeType.TENSOR and not one.is_ref() and not other.is_ref():
            if not _is_same(one.as_tensor(), other.as_tensor()):
                return name
        elif _serialized(one) != _serialized(other):
            return name
    return ""


def _serialized(attribute: ir.Attr) -> bytes:
    proto = ir.serde.serialize_attribute(attribute)
    proto.doc_string = ""
    return bytes(proto.SerializeToString(deterministic=True))


def _of_weights(expected: ir.Graph, found: ir.Graph) -> Iterator[str]:
    ours, theirs = expected.initializers, found.initializers
    for name in chain(ours, (n for n in theirs if n not in ours)):
        if name not in theirs:
            yield f"it lacks the weight {name}"
        elif name not in ours:
            yield f"it has another weight {name}"
        else:
            a, b = ours[name].const_value, theirs[name].const_value
            if a is None or b is None or not _is_same(a, b):
                yield f"its weight {name} is another"


def _is_same(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    if a.dtype != b.dtype or list(a.shape.numpy()) != list(b.shape.numpy()):
        return False
    if a.dtype == ir.DataType.STRING:
        return bool((a.numpy() == b.numpy()).all())
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor) and _place(a) == _place(b):
        return True  # the same bytes of the same file
    one, other = a.numpy(), b.numpy()
    if np.array_equal(_bytes(one), _bytes(other)):
        return True
    return isinstance(a, ir.LazyTensor) and a.dtype in _EPSILON and _is_close(one, other, _EPSILON[a.dtype])


def _is_close(expected: NDArray[Any], found: NDArray[Any], epsilon: float) -> bool:
    """Whether what was computed is the same but for the order of additions, which is the processor's."""
    a, b = expected.astype(np.float32), found.astype(np.float32)
    allowed = 2 * epsilon * np.abs(a) + 1e-6 * np.abs(a).max(initial=0)
    return bool((np.abs(a - b) <= allowed).all())


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _place(tensor: ir.ExternalTensor) -> tuple[str, int, int]:
    return str(source_file(str(tensor.name), tensor)), tensor.offset or 0, tensor.nbytes
