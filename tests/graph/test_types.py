"""Dtypes behind operators that ONNX's own inference does not know."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from nbl_export.graph.types import infer_types

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
