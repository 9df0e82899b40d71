"""Weights that are NaN or infinite are named, and masks may be minus infinity."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from nbl_export.errors import InputError
from nbl_export.graph import finite
from nbl_export.graph.finite import check_finite
from nbl_export.graph.io import load_graph
from tests.graph.quantized import n_bits

KINDS = {
    "fp32": (ir.DataType.FLOAT, np.float32),
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}


def model(op: str, kind: str, bad: float) -> ir.Model:
    """x ─► op ─► y with a constant of 2 × 3, one of whose numbers is ``bad``."""
    dtype, numpy = KINDS[kind]
    array = np.ones((2, 3), dtype=numpy)
    array[1, 2] = bad
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, ["x", "c"], ["y"], name="reader")],
            "g",
            [helper.make_tensor_value_info("x", int(dtype), [3, 2])],
            [helper.make_tensor_value_info("y", int(dtype), None)],
            [],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    graph = ir.from_proto(proto)
    value = ir.Value(
        name="c",
        const_value=ir.tensor(array, dtype=dtype, name="c"),
        type=ir.TensorType(dtype),
        shape=ir.Shape([2, 3]),
    )
    node = graph.graph[0]
    graph.graph.register_initializer(value)
    node.replace_input_with(1, value)
    return graph


def test_every_part_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_PART", 4)
    with pytest.raises(InputError, match="is NaN at 1 of 6"):
        check_finite(model("MatMul", "bf16", np.nan), "decoder.onnx")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_a_weight_is_named(kind: str, bad: float, word: str) -> None:
    with pytest.raises(
        InputError, match=rf"its weight c, which MatMul \(reader\) reads, is {word} at 1 of 6"
    ) as caught:
        check_finite(model("MatMul", kind, bad), "decoder.onnx")
    assert str(caught.value).startswith("decoder.onnx ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_may_be_minus_infinity_and_not_nan(kind: str) -> None:
    check_finite(model("Add", kind, -np.inf), "it")
    with pytest.raises(InputError, match="is NaN"):
        check_finite(model("Add", kind, np.nan), "it")


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_numbers_are_finite(kind: str) -> None:
    for number in (ml_dtypes.finfo(KINDS[kind][1]).max, ml_dtypes.finfo(KINDS[kind][1]).tiny, 0.0):
        check_finite(model("MatMul", kind, float(number)), "it")


def test_scales_of_quantized_weights_count(tiny_graph: Path) -> None:
    graph = n_bits(4, 16, False, 2, accuracy=None)
    check_finite(graph, "it")
    scales = graph.graph.initializers["s"]
    assert scales.const_value is not None
    array = scales.const_value.numpy().copy()
    array.flat[0] = np.inf
    scales.const_value = ir.tensor(array, name="s")
    with pytest.raises(InputError, match="its weight s, which MatMulNBits"):
        check_finite(graph, "it")
    check_finite(load_graph(tiny_graph), "it")
    assert TensorProto.FLOAT == 1


def looked_up(reader: str, bad: float) -> ir.Model:
    """Rows of a table are looked up, and ``reader`` reads them."""
    graph = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (int64[n] i, float[3] x) => (y) <float[2,3] table = {{0, 1, 2, 3, 4, 5}}>
        {{ rows = Gather(table, i)
           y = {reader}(rows, x) }}"""
    )
    found = ir.from_proto(graph)
    table = found.graph.initializers["table"]
    assert table.const_value is not None
    array = table.const_value.numpy().copy()
    array[1, 2] = bad
    table.const_value = ir.tensor(array, name="table")
    return found


def test_a_table_of_masks_may_hold_minus_infinity_and_embeddings_may_not() -> None:
    check_finite(looked_up("Add", -np.inf), "it")
    for reader, bad in [("Add", np.inf), ("Add", np.nan), ("Mul", -np.inf), ("Pow", -np.inf)]:
        with pytest.raises(InputError, match="its weight table"):
            check_finite(looked_up(reader, bad), "it")
