"""Graphs that would take hours or all memory are refused by their counts; those of ordinary size are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from nbl_export.errors import InputError
from nbl_export.graph import limits
from nbl_export.graph.io import load_graph

make = helper.make_node
OPSETS = [
    helper.make_opsetid("", 18),
    helper.make_opsetid("local", 1),
    helper.make_opsetid("com.microsoft", 1),
]


def save(path: Path, nodes: list[onnx.NodeProto], functions: Any = ()) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", 4])], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=OPSETS, functions=list(functions))
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_graph(path)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    """A function from x to y through ``calls`` in a row: names of others, or an operator."""
    names = ["x", *(f"v{i}" for i in range(len(calls) - 1)), "y"]
    nodes = [
        make(call, [a], [b], domain="local" if call.startswith("F") else "")
        for call, a, b in zip(calls, names, names[1:], strict=False)
    ]
    return helper.make_function("local", name, ["x"], ["y"], nodes, OPSETS)


def test_functions_that_grow(tmp_path: Path) -> None:
    bodies = [function("F0", ["Identity"] * 3), *(function(f"F{i}", [f"F{i - 1}"] * 3) for i in range(1, 30))]
    path = save(tmp_path / "m.onnx", [make("F29", ["x"], ["y"], domain="local")], bodies)
    assert "when its functions are inlined, the limit is 1,000,000" in refusal(path)
    path = save(tmp_path / "m.onnx", [make("F3", ["x"], ["y"], domain="local")], bodies[:4])
    assert load_graph(path).graph.num_nodes() == 1


@pytest.mark.parametrize("through", [1, 2, 50])
def test_functions_that_call_themselves(tmp_path: Path, through: int) -> None:
    bodies = [function(f"F{i}", [f"F{(i + 1) % through}"]) for i in range(through)]
    path = save(tmp_path / "m.onnx", [make("F0", ["x"], ["y"], domain="local")], bodies)
    assert "calls itself" in refusal(path)


def test_too_many_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODES", 100)
    names = ["x", *(f"v{i}" for i in range(200)), "y"]
    nodes = [make("Identity", [a], [b]) for a, b in pairwise(names)]
    assert "has 201 nodes, the limit is 100" in refusal(save(tmp_path / "m.onnx", nodes))
    inner = helper.make_graph(
        nodes, "inner", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    branch = make("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    assert "has 403 nodes" in refusal(save(tmp_path / "m.onnx", [branch]))


def wrong(op: str, domain: str = "", inputs: int = 2, **attributes: Any) -> onnx.NodeProto:
    return make(op, ["x"] * inputs, ["y"], domain=domain, **attributes)


WRONG: dict[str, Callable[[], onnx.NodeProto]] = {
    "a float for an integer": lambda: wrong(
        "MatMulNBits", "com.microsoft", 3, K=4.5, N=4, bits=4, block_size=32
    ),
    "a text for an integer": lambda: wrong(
        "MatMulNBits", "com.microsoft", 3, K=4, N="4", bits=4, block_size=32
    ),
    "no heads": lambda: wrong("GroupQueryAttention", "com.microsoft", 7, num_heads=0, kv_num_heads=1),
    "a dtype that is none": lambda: wrong("Cast", inputs=1, to=99),
    "a dtype that is a list": lambda: wrong("Cast", inputs=1, to=[1]),
    "a constant that is a number": lambda: wrong("Constant", inputs=0, value=5),
    "an order that is a number": lambda: wrong("Transpose", inputs=1, perm=1),
    "a product of nothing": lambda: wrong("MatMul", inputs=0),
    "an addition of one": lambda: wrong("Add", inputs=1),
}


@pytest.mark.parametrize("how", WRONG)
def test_attributes_and_inputs_that_an_operator_does_not_have(tmp_path: Path, how: str) -> None:
    assert "operator" in refusal(save(tmp_path / "m.onnx", [WRONG[how]()]))


@pytest.mark.parametrize(
    ("op", "domain", "attributes"),
    [
        # As onnxruntime-genai writes them beside a GroupQueryAttention that does not rotate itself.
        ("RotaryEmbedding", "com.microsoft", {"num_heads": 0, "rotary_embedding_dim": 0, "interleaved": 0}),
        ("MRotaryEmbedding", "com.microsoft", {"num_heads": 0}),
        ("RotaryEmbedding", "", {"num_heads": 8}),
        ("GroupQueryAttention", "com.microsoft", {"num_heads": 8, "kv_num_heads": 2, "softcap": 0.0}),
        ("MatMulNBits", "com.microsoft", {"K": 64, "N": 4, "bits": 4, "block_size": 32, "accuracy_level": 0}),
        ("Gemm", "", {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}),
        ("Cast", "", {"to": 10}),
        ("DequantizeLinear", "", {"axis": 1, "block_size": 0}),
    ],
)
def test_what_exporters_write_is_right(
    tmp_path: Path, op: str, domain: str, attributes: dict[str, Any]
) -> None:
    load_graph(save(tmp_path / "m.onnx", [wrong(op, domain, 3, **attributes)]))


def test_a_reference_in_a_function_is_no_value(tmp_path: Path) -> None:
    node = make("Cast", ["x"], ["y"])
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "to", "kind", onnx.AttributeProto.INT
    body = helper.make_function("local", "F0", ["x"], ["y"], [node], OPSETS, ["kind"])
    path = save(tmp_path / "m.onnx", [make("F0", ["x"], ["y"], domain="local", kind=1)], [body])
    assert load_graph(path).graph.num_nodes() == 1


@pytest.mark.parametrize("name", [b"Identity", b"x", b"first", b"local"])
def test_a_name_that_is_no_text(tmp_path: Path, name: bytes) -> None:
    """Of an operator, a value, a node, a domain; protobuf gives such a name as bytes."""
    path = save(
        tmp_path / "m.onnx", [make("Identity", ["x"], ["y"], name="first")], [function("F", ["Identity"])]
    )
    raw = path.read_bytes()
    assert name in raw and load_graph(path)
    path.write_bytes(raw.replace(name, b"\xff" * len(name)))
    assert "has a name that is no text" in refusal(path)
