"""What an ONNX file may hold, checked before it is searched, checked by libraries, or run.

A graph is a program that somebody else wrote. Its size bounds most of the work on it, with two exceptions that are
counted here: functions that call each other grow when they are inlined, 3^30 nodes of thirty functions, and attributes
of another type than their operator's would have to be guarded against wherever one is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from nbl_export.errors import InputError
from nbl_export.graph.operators import MICROSOFT

NODES = 100_000  # of a graph, with those in its branches, loops and functions; a 70B model has 20,000
_INLINED = 1_000_000  # when every call of a function is replaced by its nodes
_EXPORT_AGAIN = "export the model again"
_Kind = ir.AttributeType
# The attributes that this package reads, by name: their type, and their least value.
_ATTRIBUTES: dict[str, tuple[ir.AttributeType, int | None]] = {
    "num_heads": (_Kind.INT, 1),
    "kv_num_heads": (_Kind.INT, 1),
    "q_num_heads": (_Kind.INT, 1),
    "K": (_Kind.INT, 1),
    "N": (_Kind.INT, 1),
    "bits": (_Kind.INT, 1),
    "block_size": (_Kind.INT, 0),
    "accuracy_level": (_Kind.INT, None),
    "to": (_Kind.INT, 1),
    "start": (_Kind.INT, None),
    "end": (_Kind.INT, None),
    "transA": (_Kind.INT, 0),
    "transB": (_Kind.INT, 0),
    "perm": (_Kind.INTS, None),
    "softcap": (_Kind.FLOAT, None),
    "epsilon": (_Kind.FLOAT, None),
}
# These names are other things in other operators. A rotary embedding knows its heads from the shape, and says 0.
_OF_OPERATORS: dict[tuple[str, str], tuple[ir.AttributeType, int | None]] = {
    ("Constant", "value"): (_Kind.TENSOR, None),
    ("ConstantOfShape", "value"): (_Kind.TENSOR, None),
    ("RotaryEmbedding", "num_heads"): (_Kind.INT, 0),
    ("MRotaryEmbedding", "num_heads"): (_Kind.INT, 0),
}
# Half of them would be read without: onnx names the operators, and this package uses what they must have.
_LEAST_INPUTS = {
    "Concat": 1,
    "Cast": 1,
    "Reshape": 1,
    "Add": 2,
    "MatMul": 2,
    "Gemm": 2,
    "TensorScatter": 2,
    "Mul": 2,
}


def read_proto(path: Path) -> onnx.ModelProto:
    """The parsed file, without its external data; raises :class:`InputError` for one beyond the limits."""
    proto = onnx.load(str(path), load_external_data=False)
    _check_text(path, proto)
    own = sum(1 for _ in _nodes(proto.graph))
    bodies = {(f.domain, f.name, f.overload): f for f in proto.functions}
    total = own + sum(1 for f in bodies.values() for _ in _nodes(f))
    if total > NODES:
        raise InputError(f"{path} has {total:,} nodes, the limit is {NODES:,}: {_EXPORT_AGAIN}.")
    inlined = _inlined(path, proto.graph, bodies)
    if inlined > _INLINED:
        raise InputError(
            f"{path} has {inlined:,} nodes when its functions are inlined, the limit is {_INLINED:,}: {_EXPORT_AGAIN}."
        )
    return proto


def _check_text(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse a name that is no UTF-8: protobuf gives it as bytes, which nothing can look up or write again."""
    stack: list[Any] = [proto]
    while stack:
        message = stack.pop()
        if isinstance(message, onnx.TensorProto):  # its other fields are numbers, and may be large
            texts, inner = [message.name, message.doc_string], [message.external_data]
        else:
            fields = message.ListFields()
            texts = [value for field, value in fields if field.type == field.TYPE_STRING]
            inner = [value for field, value in fields if field.type == field.TYPE_MESSAGE]
        for value in texts:
            for text in [value] if isinstance(value, (str, bytes)) else value:
                if not isinstance(text, str):
                    raise InputError(f"{path} has a name that is no text ({text[:40]!r}): {_EXPORT_AGAIN}.")
        for value in inner:
            stack.extend([value] if hasattr(value, "ListFields") else value)


def _nodes(body: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or a function, with those of branches and loop bodies."""
    stack = [body]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def _inlined(path: Path, graph: onnx.GraphProto, bodies: dict[tuple[str, str, str], Any]) -> int:
    """The number of nodes of ``graph`` with every call replaced by its function's nodes."""
    sizes: dict[tuple[str, str, str], int] = {}

    def called(body: Any) -> list[tuple[str, str, str]]:
        keys = ((n.domain, n.op_type, n.overload) for n in _nodes(body))
        return [key if key in bodies else ("", "", "") for key in keys]

    calls = {key: called(body) for key, body in bodies.items()}
    sizes["", "", ""] = 1
    open_: list[tuple[str, str, str]] = []
    for start in bodies:
        stack = [(start, False)]
        while stack:
            key, ready = stack.pop()
            if ready:
                open_.pop()
                sizes[key] = 1 + sum(sizes[inner] for inner in calls[key])
            elif key in open_:
                raise InputError(f"{path}: the function {key[1][:100]} calls itself: {_EXPORT_AGAIN}.")
            elif key not in sizes:
                open_.append(key)
                stack.append((key, True))
                stack += [(inner, False) for inner in set(calls[key]) if inner not in sizes]
    return sum(sizes[key] for key in called(graph))


def check_attributes(path: Path, model: ir.Model) -> None:
    """Refuse a node whose attributes are of another type than its operator's, or whose inputs are missing."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx", MICROSOFT):
            continue
        for name, attribute in node.attributes.items():
            known = _OF_OPERATORS.get((node.op_type, name)) or _ATTRIBUTES.get(name)
            kind, least = known or (None, None)
            if kind is None or attribute.is_ref():
                continue
            fits = attribute.type == kind and attribute.value is not None
            if fits and least is not None:
                fits = attribute.value >= least
            if fits and name == "to":
                fits = attribute.value in {int(t) for t in ir.DataType}
            if not fits:
                raise InputError(
                    f"{path}: the attribute {name} of {node.op_type} ({node.name}) has another type or value than its "
                    f"operator allows: {_EXPORT_AGAIN}."
                )
        if len(node.inputs) < _LEAST_INPUTS.get(node.op_type, 0) or not node.outputs:
            raise InputError(
                f"{path}: {node.op_type} ({node.name}) has {len(node.inputs)} inputs and {len(node.outputs)} outputs, "
                f"which its operator does not allow: {_EXPORT_AGAIN}."
            )
