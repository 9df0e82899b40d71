"""Operators as data: shapes of weights against the product that onnxruntime computes, dtypes, what is constant."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from nbl_export.graph.cores import NotFound, Search, core_of
from nbl_export.graph.operators import (
    FUSED,
    LINEAR,
    MICROSOFT,
    SKIP_NORMS,
    captured,
    infer_types,
    is_constant,
    linear_op,
    weight_bits,
    weight_format,
    weight_shape,
)
from tests.fixtures_graph import cpu_session
from tests.graph.by_hand import dequantized, dynamic, graph, matrix, n_bits, parsed

ROWS, COLUMNS = 5, 3
W = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def node_of(model: ir.Model, op: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op)


def product(text: str, **weights: Any) -> ir.Model:
    return parsed(f"g (float[n,{ROWS}] x) => (float[n,{COLUMNS}] y) {{ {text} }}", **weights)


# Each computes y [n, 3] from x [n, 5].
PRODUCTS = {
    "as it is": product("y = MatMul(x, w)", w=W),
    "turned by a node": product("t = Transpose(w) y = MatMul(x, t)", w=W.T.copy()),
    "turned twice": product("t = Transpose(w) u = Transpose(t) y = MatMul(x, u)", w=W),
    "turned by an attribute": product("y = Gemm <transB = 1> (x, w)", w=W.T.copy()),
    "turned by both": product("t = Transpose(w) y = Gemm <transB = 1> (x, t)", w=W),
    "with a bias": product("y = Gemm(x, w, b)", w=W, b=np.zeros(COLUMNS, np.float32)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_weights_shape_is_that_of_the_map(name: str) -> None:
    model = PRODUCTS[name]
    runner = cpu_session(model)
    x = np.eye(ROWS, dtype=np.float32)  # so that y is the matrix itself
    (y,) = runner.run(["y"], {"x": x})
    node = next(n for n in model.graph if n.op_type in ("MatMul", "Gemm"))
    assert weight_shape(node) == y.shape == (ROWS, COLUMNS)


def test_a_stack_of_matrices_is_not_one() -> None:
    model = parsed(
        f"g (float[2,n,{ROWS}] x) => (float[2,n,{COLUMNS}] y) {{ y = MatMul(x, w) }}", w=np.stack([W, W])
    )
    node = node_of(model, "MatMul")
    assert linear_op(node) is not None and weight_shape(node) is None


def test_a_product_of_two_activations_is_no_linear_map() -> None:
    model = parsed("g (float[n,4] a, float[4,n] b) => (float[n,n] y) { y = MatMul(a, b) }")
    node = node_of(model, "MatMul")
    assert linear_op(node) is None and weight_shape(node) is None
    assert linear_op(node_of(PRODUCTS["turned by a node"], "Transpose")) is None


# constants ---------------------------------------------------------------------------------------


def test_what_only_constant_nodes_lie_behind_is_a_weight() -> None:
    model = parsed(
        """g (float[n,2] x) => (float[n,2] y) {
            c = Constant <value = float[2,2] {1, 2, 3, 4}> ()
            both = Mul(c, w)
            turned = Transpose(both)
            z = MatMul(x, turned)
            shape = Shape(w)
            size = Shape(x)
            mixed = Add(both, x)
            y = Add(z, mixed)
        }""",
        w=np.eye(2, dtype=np.float32),
    )
    values = {v.name: v for node in model.graph for v in node.outputs}
    constant = {name for name, value in values.items() if is_constant(value)}
    # A shape is no weight, be it of one.
    assert constant == {"c", "both", "turned"}
    assert is_constant(model.graph.initializers["w"])
    assert not is_constant(model.graph.inputs[0]) and not is_constant(None)


def test_what_a_branch_reads_of_the_graph_around_it() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (bool go, float[2] a, float[2] b, float[2] unread) => (float[2] y) {
            h = Relu(a)
            y = If (go) <
                then_branch = one () => (float[2] t) { i = Neg(h) t = Add(i, b) },
                else_branch = other () => (float[2] e) {
                    e = If (go) <
                        then_branch = deep () => (float[2] p) { p = Identity(a) },
                        else_branch = deeper () => (float[2] q) { q = Neg(b) }
                    >
                }
            >
        }"""
    )
    node = node_of(ir.from_proto(proto), "If")
    # Outer tensors alone, from every depth; what a branch makes itself is not among them.
    assert {v.name for v in captured(node)} == {"h", "b", "a", "go"}
    assert captured(node_of(PRODUCTS["as it is"], "MatMul")) == []


# the tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(name for domain, name in (*LINEAR, *FUSED) if domain == ""))
def test_numbers_of_inputs_and_outputs_are_those_of_onnx(name: str) -> None:
    schema = onnx.defs.get_schema(name, 23)
    inputs, outputs = [i.name for i in schema.inputs], [o.name for o in schema.outputs]
    if ("", name) in LINEAR:
        op = LINEAR["", name]
        assert inputs[op.weight] in ("B", "b")
        assert op.bias is None or inputs[op.bias] in ("C", "c")
    if ("", name) in FUSED:
        fused = FUSED["", name]
        assert fused.past is not None
        assert [inputs[i] for i in fused.past] == ["past_key", "past_value"]
        assert [outputs[i] for i in fused.present] == ["present_key", "present_value"]
        assert [inputs[i] for i in fused.new] == ["K", "V"]


def test_numbers_of_onnxruntimes_operators_are_its_own() -> None:
    native: Any = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    schemas = {s.name: s for s in native.get_all_operator_schema() if s.domain == MICROSOFT}
    for (domain, name), op in FUSED.items():
        if domain == MICROSOFT and op.past:
            names = [i.name for i in schemas[name].inputs]
            assert ["key" in names[op.past[0]], "value" in names[op.past[1]]] == [True, True], name
            assert all("past" in names[i] for i in op.past), name
            given = [o.name for o in schemas[name].outputs]
            assert all("present" in given[i] for i in op.present), name
    for (domain, name), op in LINEAR.items():
        if domain == MICROSOFT and op.bias is not None:
            assert schemas[name].inputs[op.bias].name == "bias"
    for (_, name), bias in SKIP_NORMS.items():
        names = [i.name for i in schemas[name].inputs]
        assert names[:2] == ["input", "skip"] and names[bias] == "bias"


F16, F32, I64, BOOL = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
MS = "com.microsoft"


def model_of(*nodes: Any, kinds: dict[str, int]) -> ir.Model:
    proto = helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT16, None)],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)],
        ir_version=10,
    )
    return ir.from_proto(proto)


HALF = {"x": TensorProto.FLOAT16, "g": TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("node", "dtypes"),
    [
        pytest.param(
            helper.make_node("SkipSimplifiedLayerNormalization", ["x", "x", "g"], list("abcd"), domain=MS),
            [F16, F32, F32, F16],
            id="statistics of a fused norm are float32",
        ),
        pytest.param(helper.make_node("QuickGelu", ["x"], ["a"], domain=MS), [F16], id="as its input"),
        pytest.param(
            helper.make_node("GatherBlockQuantized", ["q", "i", "g"], ["a"], domain=MS),
            [F16],
            id="as its scales",
        ),
        pytest.param(helper.make_node("IsNaN", ["x"], ["a"]), [BOOL], id="boolean"),
        pytest.param(helper.make_node("Shape", ["x"], ["a"]), [I64], id="integer"),
    ],
)
def test_what_an_operator_writes(node: Any, dtypes: list[ir.DataType]) -> None:
    kinds = {**HALF, "q": TensorProto.UINT8, "i": TensorProto.INT64}
    kinds = {name: kind for name, kind in kinds.items() if name in node.input}
    model = model_of(node, kinds=kinds)
    infer_types(model)
    assert [v.dtype for v in model.graph[0].outputs] == dtypes


def test_what_follows_an_unknown_operator_is_known_too() -> None:
    """ONNX's inference stops at the first."""
    model = model_of(
        helper.make_node("QuickGelu", ["x"], ["a"], domain=MS),
        helper.make_node("Mul", ["a", "g"], ["b"]),
        helper.make_node("Greater", ["b", "a"], ["c"]),
        helper.make_node("Where", ["c", "b", "a"], ["d"]),
        helper.make_node("Cast", ["d"], ["e"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["e"], ["out"], to=TensorProto.FLOAT16),
        kinds=HALF,
    )
    infer_types(model)
    found = {v.name: v.dtype for node in model.graph for v in node.outputs}
    assert found == {"a": F16, "b": F16, "c": BOOL, "d": F16, "e": F32, "out": F16}


def test_bits_and_format_are_told() -> None:
    plain = graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="neighbour")], {"w": matrix()})
    told = [
        (plain, 0, "float"),
        (n_bits(4, 16, False, 1, None), 4, "int4 in blocks of 16"),
        (n_bits(8, 32, True, 2, None), 8, "int8 in blocks of 32"),
        (dequantized(TensorProto.UINT4, 16, True), 4, "int4 in blocks of 16"),
        (dequantized(TensorProto.INT8, None, False, turned=True), 8, "int8"),
        (dynamic("MatMulInteger", True, False), 8, "int8"),
        (dynamic("DynamicQuantizeMatMul", False, True), 8, "int8"),
    ]
    for model, bits, words in told:
        node = next(n for n in model.graph if n.name == "neighbour")
        assert (weight_bits(node), weight_format(node)) == (bits, words)


def core(edges: dict[str, list[str]], last: str) -> str:
    """Of a graph whose node ``name`` reads ``edges[name]``, in that order, and writes a tensor of its own name."""
    nodes = "\n".join(f"{name} = Sum({', '.join(reads)})" for name, reads in edges.items())
    model = parsed(
        f"g (float[b,s] k, float[b,s] v, float[b,s] input_ids) => (float[b,s] {last}) {{ {nodes} }}"
    )
    k, v, _ = model.graph.inputs
    return str(core_of(Search(model), (k, v)).outputs[0].name)


def by_definition(edges: dict[str, list[str]], last: str) -> str | None:
    """The first node that both reach and without which neither reaches the last."""

    def reached(starts: set[str], without: str = "") -> set[str]:
        found = set(starts)
        for name, reads in edges.items():
            if name != without and found & set(reads):
                found.add(name)
        return found

    both = reached({"k"}) & reached({"v"})
    if last not in both:
        return None
    return next((n for n in edges if n in both and last not in reached({"k", "v"}, n)), None)


@pytest.mark.parametrize("seed", range(200))
def test_any_graph_against_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    edges: dict[str, list[str]] = {}
    for i in range(rng.randrange(3, 14)):
        known = ["k", "v", "input_ids", *edges]
        edges[f"n{i}"] = rng.sample(
            known[-5:] if rng.random() < 0.7 else known, min(len(known), rng.choice([1, 2]))
        )
    last = f"n{len(edges) - 1}"
    expected = by_definition(edges, last)
    if "input_ids" not in {r for reads in edges.values() for r in reads}:
        edges["n0"].append("input_ids")
        expected = by_definition(edges, last)
    if expected is None:
        with pytest.raises(NotFound):
            core(edges, last)
    else:
        assert core(edges, last) == expected
