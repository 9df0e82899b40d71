"""A norm of a sum in one node: the same numbers, and the sum for whoever reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.export.fused import fuse_norms
from nbl_export.graph.operators import SKIP_NORMS
from tests.sessions import cpu_session

D = 16
RNG = np.random.default_rng(0)
GIVEN = {name: RNG.standard_normal((2, 5, D), dtype=np.float32) for name in ("h", "y")}
SCALE, BIAS = (RNG.standard_normal(D, dtype=np.float32) for _ in range(2))


def model(
    norm: str, summand: str = "y", shape: tuple[Any, ...] = ("b", "s", D), **attributes: Any
) -> ir.Model:
    """h, y ─► Add ─► norm; the sum is an output too. ``summand`` may be the constant bias."""
    weights = {"scale": SCALE, "bias": BIAS}
    inputs = ["sum", "scale"] + (["bias"] if norm == "LayerNormalization" else [])
    nodes = [
        helper.make_node("Add", ["h", summand], ["sum"]),
        helper.make_node(norm, inputs, ["normed"], **{"axis": -1, "epsilon": 1e-3, **attributes}),
    ]

    def value(name: str, of: tuple[Any, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, of)

    graph = helper.make_graph(
        nodes,
        "g",
        [value("h", ("b", "s", D)), value("y", shape)],
        [value("normed", ("b", "s", D)), value("sum", ("b", "s", D))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(proto)


def run(graph: ir.Model) -> list[Any]:
    session = cpu_session(graph)
    return list(session.run(["normed", "sum"], {v.name: GIVEN[v.name] for v in graph.graph.inputs}))


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_the_numbers_are_the_same(norm: str) -> None:
    apart, fused = model(norm), model(norm)
    assert fuse_norms(fused) == 1
    (node,) = fused.graph
    assert (node.domain, node.op_type) in SKIP_NORMS
    for found, expected in zip(run(fused), run(apart), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"summand": "bias"},  # of a projection: no residual
        {"shape": ("b", 1, D)},  # one row for all tokens
        {"shape": (1, "s", D)},
        {"axis": 1},
    ],
    ids=str,
)
def test_what_is_no_residual_stream_is_left_alone(other: dict[str, Any]) -> None:
    graph = model("RMSNormalization", **other)
    assert fuse_norms(graph) == 0
    assert [node.op_type for node in graph.graph] == ["Add", "RMSNormalization"]
