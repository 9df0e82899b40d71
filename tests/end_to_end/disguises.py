"""Changes that leave what a graph computes as it is: what optimizers and exporters do to names, order and nodes.

Each takes a model and a source of randomness and changes the model in place.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Disguise = Callable[[onnx.ModelProto, random.Random], None]


def rename(model: onnx.ModelProto, rng: random.Random) -> None:
    """Every node and every tensor that is no input or output of the graph gets a name that says nothing."""
    graph = model.graph
    public = {v.name for v in (*graph.input, *graph.output)}
    inner = {t.name for t in graph.initializer} | {n for node in graph.node for n in node.output} - {""}
    names = sorted(inner - public)
    numbers = rng.sample(range(10 * len(names) + 10), len(names))
    new = {name: f"t{number}" for name, number in zip(names, numbers, strict=True)}
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for node in graph.node:
        node.name = f"n{rng.randrange(10**9)}"
        node.input[:] = [new.get(n, n) for n in node.input]
        node.output[:] = [new.get(n, n) for n in node.output]


def shuffle(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another topological order of the nodes, another order of the initializers."""
    graph = model.graph
    waiting = list(graph.node)
    made = {n for node in waiting for n in node.output} - {""}
    order: list[onnx.NodeProto] = []
    while waiting:
        missing = made - {n for node in order for n in node.output}
        ready = [node for node in waiting if not missing & set(node.input)]
        chosen = rng.choice(ready)
        waiting.remove(chosen)
        order.append(chosen)
    tensors = list(graph.initializer)
    rng.shuffle(tensors)
    for field, values in ((graph.node, order), (graph.initializer, tensors)):
        copies = [type(v).FromString(v.SerializeToString()) for v in values]
        del field[:]
        field.extend(copies)


def views(model: onnx.ModelProto, rng: random.Random) -> None:
    """Identity, a Cast to the type that it is, or a Dropout that drops nothing, between nodes."""
    graph = model.graph
    types = _types(model)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for index, name in enumerate(node.input):
            if name not in types or rng.random() > 0.15:
                continue
            kinds = ["Identity", "Cast", *(["Dropout"] if types[name] == TensorProto.FLOAT else [])]
            kind, output = rng.choice(kinds), f"view{len(graph.node)}"
            attributes = {"to": types[name]} if kind == "Cast" else {}
            graph.node.append(helper.make_node(kind, [name], [output], name=output, **attributes))
            node.input[index] = output
        graph.node.append(node)


def constants(model: onnx.ModelProto, rng: random.Random) -> None:
    """Some initializers become Constant nodes, written in each way that ONNX has."""
    graph = model.graph
    for tensor in list(graph.initializer):
        if rng.random() < 0.5:
            graph.initializer.remove(tensor)
            graph.node.insert(0, _constant(tensor, rng))


def _constant(tensor: onnx.TensorProto, rng: random.Random) -> onnx.NodeProto:
    array = numpy_helper.to_array(tensor)
    forms: dict[str, object] = {"value": tensor}
    kind = {np.dtype(np.float32): "float", np.dtype(np.int64): "int"}.get(array.dtype)
    if kind and array.ndim == 0:
        forms[f"value_{kind}"] = array.item()
    elif kind and array.ndim == 1 and array.size:
        forms[f"value_{kind}s"] = array.tolist()
    form = rng.choice(sorted(forms))
    return helper.make_node(
        "Constant", [], [tensor.name], name=f"constant {tensor.name}", **{form: forms[form]}
    )


def dead(model: onnx.ModelProto, rng: random.Random) -> None:
    """Nodes that nobody reads, and a weight that nobody uses."""
    graph = model.graph
    names = sorted(name for name, kind in _types(model).items() if kind == TensorProto.FLOAT)
    for number in range(4):
        graph.node.append(
            helper.make_node("Neg", [rng.choice(names)], [f"dead{number}"], name=f"dead{number}")
        )
    graph.initializer.append(numpy_helper.from_array(np.ones(300, np.float32), "unused"))


def twins(model: onnx.ModelProto, rng: random.Random) -> None:
    """Nodes computed twice, each copy with readers of its own: the opposite of merging equal nodes."""
    graph = model.graph
    public = {v.name for v in graph.output}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        reads = [(n, k) for n in graph.node for k, name in enumerate(n.input) if name == node.output[0]]
        if len(node.output) > 1 or node.output[0] in public or len(reads) < 2 or rng.random() > 0.3:
            continue
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.name, copy.output[0] = f"{node.name} twin", f"{node.output[0]} twin"
        for reader, place in rng.sample(reads, rng.randrange(1, len(reads))):
            reader.input[place] = copy.output[0]
        graph.node.insert(index + 1, copy)


def merge(model: onnx.ModelProto, rng: random.Random) -> None:
    """Equal constants and equal nodes become one."""
    graph = model.graph
    public = {v.name for v in graph.output}
    new: dict[str, str] = {}
    first: dict[bytes, str] = {}
    for tensor in list(graph.initializer):
        key = bytes([tensor.data_type]) + str(tensor.dims).encode() + numpy_helper.to_array(tensor).tobytes()
        new[tensor.name] = first.setdefault(key, tensor.name)
        if new[tensor.name] != tensor.name:
            graph.initializer.remove(tensor)
    seen: dict[bytes, list[str]] = {}
    for node in list(graph.node):
        node.input[:] = [new.get(n, n) for n in node.input]
        key_node = onnx.NodeProto.FromString(node.SerializeToString())
        del key_node.output[:]
        key_node.name = ""
        same = seen.setdefault(key_node.SerializeToString(), list(node.output))
        if same != list(node.output) and not public & set(node.output):
            new |= dict(zip(node.output, same, strict=True))
            graph.node.remove(node)


def inferred(model: onnx.ModelProto, rng: random.Random) -> None:
    """Types and shapes of inner tensors, as far as ONNX infers them."""
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


def untyped_cache(model: onnx.ModelProto, rng: random.Random) -> None:
    """Outputs that say no shape."""
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


def _types(model: onnx.ModelProto) -> Counter[str]:
    """Data type of each tensor that some node writes and ONNX can tell, outputs of the graph left out."""
    inferred_model = onnx.shape_inference.infer_shapes(model)
    made = {n for node in model.graph.node for n in node.output}
    return Counter(
        {
            v.name: v.type.tensor_type.elem_type
            for v in inferred_model.graph.value_info
            if v.name in made and v.type.tensor_type.elem_type
        }
    )


DISGUISES: dict[str, Disguise] = {
    f.__name__: f for f in (rename, shuffle, views, constants, dead, twins, merge, inferred, untyped_cache)
}
