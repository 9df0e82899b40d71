"""Graphs with external data in every place, and readers of them that are not the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

DATA = "model.onnx.data"
Place = tuple[str, int, int]


def external(name: str, kind: int, dims: Sequence[int], place: Place) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph_of(
    initializers: Sequence[onnx.TensorProto], nodes: Sequence[onnx.NodeProto] = ()
) -> onnx.ModelProto:
    """A model that uses each initializer; its types and shapes are those of the initializers."""
    nodes = [
        *nodes,
        *(
            helper.make_node("Identity", [t.name], [f"{t.name}.out"], name=f"use {t.name}")
            for t in initializers
        ),
    ]
    outputs = [helper.make_tensor_value_info(f"{t.name}.out", t.data_type, t.dims) for t in initializers]
    graph = helper.make_graph(nodes, "main", [], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def save(proto: onnx.ModelProto, path: Path, data: bytes = b"", name: str = "source.bin") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    if data:
        (path.parent / name).write_bytes(data)
    return path


def places(path: Path) -> dict[str, Place]:
    """Location, offset and length of the external initializers, read from the protobuf alone."""
    proto = onnx.load(str(path), load_external_data=False)
    found = {}
    for t in proto.graph.initializer:
        if t.data_location == TensorProto.EXTERNAL:
            fields = {e.key: e.value for e in t.external_data}
            found[t.name] = (fields["location"], int(fields["offset"]), int(fields["length"]))
    return found


def resolved(path: Path) -> onnx.ModelProto:
    """The model with all weights inside, as onnx's own loader reads it; onnx-ir adds types, drop them."""
    proto = onnx.load(str(path))
    onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        if not tensor.string_data and not tensor.raw_data and not tensor.HasField("raw_data"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    graphs = [proto.graph]
    for graph in graphs:  # which grows
        del graph.value_info[:]
        graphs += [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return proto


def raw(path: Path) -> dict[str, bytes]:
    return {t.name: t.raw_data for t in resolved(path).graph.initializer}


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def two_file_graph(folder: Path) -> Path:
    """Six initializers in two data files, one range shared by two of them, one inside the protobuf."""
    a, b = random_bytes(300_000, 1), random_bytes(200_000, 2)
    proto = graph_of(
        [
            external("large", TensorProto.FLOAT, [50_000], ("a.bin", 12, 200_000)),
            external("small", TensorProto.FLOAT16, [20, 30], ("a.bin", 250_001, 1200)),
            external("tied", TensorProto.FLOAT16, [60, 10], ("a.bin", 250_001, 1200)),
            external("other", TensorProto.BFLOAT16, [100, 100], ("b.bin", 7, 20_000)),
            external("tiny", TensorProto.INT64, [3], ("b.bin", 100_000, 24)),
            helper.make_tensor("inside", TensorProto.FLOAT, [2], [1.0, 2.0]),
        ]
    )
    path = save(proto, folder / "model.onnx", a, "a.bin")
    (folder / "b.bin").write_bytes(b)
    return path


def nested_graph(folder: Path) -> Path:
    """External tensors in both branches of an If, in a nested If, in Constants, and in a function."""
    weights = np.random.default_rng(3).standard_normal((6, 4096)).astype(np.float32)

    def place(i: int) -> onnx.TensorProto:
        return external(f"w{i}", TensorProto.FLOAT, [4096], ("source.bin", i * 16384, 16384))

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [4096])

    def branch(name: str, i: int, nodes: Sequence[onnx.NodeProto] = ()) -> onnx.GraphProto:
        out = helper.make_node("Add", ["x", nodes[-1].output[0] if nodes else f"w{i}"], [f"{name}.y"])
        return helper.make_graph([*nodes, out], name, [], [value(f"{name}.y")], [] if nodes else [place(i)])

    inner = helper.make_node(
        "If", ["flag"], ["inner.y"], then_branch=branch("deep", 1), else_branch=branch("deeper", 2)
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], name="a constant", value=place(3)),
        helper.make_node(
            "If", ["flag"], ["z"], then_branch=branch("then", 0), else_branch=branch("else", -1, [inner])
        ),
        helper.make_node("Add", ["z", "c"], ["zc"]),
        helper.make_node("Shift", ["zc"], ["y"], domain="local"),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    function = helper.make_function(
        "local",
        "Shift",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["w"], name="in a function", value=place(4)),
            helper.make_node("Add", ["a", "w"], ["b"]),
        ],
        opsets[:1],
    )
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "main", [value("x"), flag], [value("y")], [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    return save(model, folder / "model.onnx", weights.tobytes())
