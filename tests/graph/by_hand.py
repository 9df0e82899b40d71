"""Graphs made by hand: in ONNX's textual syntax, of weights stored in every way, with external data in every place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.graph.io import save_graph
from nbl_export.rewrite.quantize import pack, quantize_blocks

D = 48


MS = "com.microsoft"


def matrix(rows: int = D, columns: int = D) -> Any:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


def graph(nodes: list[Any], weights: dict[str, Any]) -> ir.Model:
    tensors = [
        value if not isinstance(value, np.ndarray) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", D])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", D])],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)],
        ir_version=10,
    )
    return ir.from_proto(proto)


def n_bits(bits: int, block: int, zeros: bool, rank: int, accuracy: int | None) -> ir.Model:
    """x ─► MatMulNBits ─► y with weights of another matrix."""
    blocks = quantize_blocks(matrix() * 3, bits, block, not zeros)
    scales = blocks.scales if rank == 2 else blocks.scales.reshape(-1)
    points = pack(blocks.zeros, bits)
    weights = {"b": pack(blocks.numbers, bits), "s": scales}
    if zeros:
        weights["z"] = points if rank == 2 else points.reshape(-1)
    attributes = {"K": D, "N": D, "bits": bits, "block_size": block}
    if accuracy is not None:
        attributes["accuracy_level"] = accuracy
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain=MS, name="neighbour", **attributes)
    return graph([node], weights)


def dequantized(dtype: int, block: int | None, zeros: bool, turned: bool = False) -> ir.Model:
    """x ─► MatMul ◄─ (Transpose ◄─) DequantizeLinear."""
    shape = [D // block, D] if block else [D]
    number = helper.make_tensor("q", dtype, [D, D], np.ones(D * D, dtype=np.int8).tolist())
    weights: dict[str, Any] = {"q": number, "s": np.full(shape, 0.5, dtype=np.float32)}
    if zeros:
        weights["z"] = helper.make_tensor("z", dtype, shape, [1] * int(np.prod(shape)))
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [helper.make_node("DequantizeLinear", list(weights), ["w"], name="dequantize", **attributes)]
    if turned:
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x", "t" if turned else "w"], ["y"], name="neighbour"))
    return graph(nodes, weights)


DYNAMIC = [
    pytest.param(op, signed, each, id=f"{op}, {'int8' if signed else 'uint8'}, {'each' if each else 'one'}")
    for op in ("MatMulInteger", "DynamicQuantizeMatMul")
    for signed in (True, False)
    for each in (False, True)
]


def dynamic(op: str, signed: bool, each: bool) -> ir.Model:
    """x ─► quantized when it is known ─► times 8-bit weights ─► y."""
    kind = np.int8 if signed else np.uint8
    shape = (D,) if each else ()
    weights = {
        "q": np.ones((D, D), kind),
        "s": np.full(shape, 0.1, np.float32),
        "z": np.full(shape, 0 if signed else 128, kind),
    }
    if op == "DynamicQuantizeMatMul":
        node = helper.make_node(op, ["x", "q", "s", "z"], ["y"], domain=MS, name="neighbour")
        return graph([node], weights)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node(op, ["xq", "q", "xz", "z"], ["i"], name="neighbour"),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    return graph(nodes, weights)


def parsed(text: str, **weights: Any) -> ir.Model:
    """A graph in ONNX's textual syntax, with ``weights`` for initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()
    )
    return ir.from_proto(proto)


def written(model: ir.Model, folder: Path) -> onnx.ModelProto:
    """``model`` on disk (checker and strict shape inference pass), read back with onnx alone."""
    path = folder / "model.onnx"
    save_graph(model, path)
    return onnx.load(str(path))


def casts(proto: onnx.ModelProto) -> Counter[tuple[str, int]]:
    """How many Casts there are of each tensor to each type."""
    return Counter((n.input[0], n.attribute[0].i) for n in proto.graph.node if n.op_type == "Cast")


def weight_types(proto: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in proto.graph.initializer}


# external data -----------------------------------------------------------------------------------

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
