"""Weights moved as rounding moves them: which, how far, how often, and what that says of a graph's own error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from nbl_export.graph import nudge as module
from nbl_export.graph.io import load_graph
from nbl_export.graph.nudge import nudge, nudged_values
from nbl_export.rewrite.quantize import pack, quantize_blocks
from tests.graph.quantized import D, dequantized, dynamic, matrix, n_bits


def moved(model: ir.Model, name: str, seed: int = 0) -> tuple[Any, Any]:
    """The values of an initializer before and after."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    before = value.const_value.numpy().copy()
    nudge(model, seed)
    after = value.const_value.numpy()
    assert after.shape == before.shape and after.dtype == before.dtype
    return before, after


def unpacked(numbers: Any, bits: int) -> Any:
    return np.stack([(numbers >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1).astype(int)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_packed_number_of_twelve_moves_by_one(bits: int) -> None:
    model = n_bits(bits, 32, True, 2, accuracy=None)
    # More numbers than the fixture has, to count them.
    wide = pack(quantize_blocks(matrix(512, 512), bits, 32, False).numbers, bits)
    b = model.graph.initializers["b"]
    b.const_value, b.shape = ir.tensor(wide, name="b"), ir.Shape(wide.shape)
    before, after = moved(model, "b")
    steps = unpacked(after, bits) - unpacked(before, bits)
    assert set(np.unique(steps)) == {-1, 0, 1}
    assert (steps != 0).mean() == pytest.approx(1 / 12, rel=0.05)
    assert steps.mean() == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8])
def test_numbers_behind_a_dequantize_linear_move(dtype: int) -> None:
    model = dequantized(dtype, 16, False)
    name = next(n.inputs[0].name for n in model.graph if n.op_type == "DequantizeLinear")
    before, after = moved(model, str(name))
    steps = after.astype(int) - before.astype(int)
    assert np.abs(steps).max() == 1 and 0 < (steps != 0).mean() < 0.2


def test_scales_and_zero_points_stay() -> None:
    model = n_bits(4, 32, True, 2, accuracy=None)
    values = {n: v.const_value for n, v in model.graph.initializers.items() if n != "b"}
    nudge(model)
    assert all(model.graph.initializers[n].const_value is tensor for n, tensor in values.items())


def test_integer_products_move() -> None:
    model = dynamic("MatMulInteger", True, False)
    node = next(n for n in model.graph if n.op_type == "MatMulInteger")
    before, after = moved(model, str(node.inputs[1].name))
    assert np.abs(after.astype(int) - before.astype(int)).max() == 1


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_halves_move_to_the_next_number(kind: Any) -> None:
    numbers = np.random.default_rng(0).standard_normal(60_000).astype(kind)
    numbers[:3] = [0, ml_dtypes.finfo(kind).max, -ml_dtypes.finfo(kind).max]
    dtype = ir.DataType.FLOAT16 if kind is np.float16 else ir.DataType.BFLOAT16
    found = nudged_values(numbers.astype(np.float32), dtype, 0)
    exact = numbers.astype(np.float32)
    assert found[0] == 0 and np.isfinite(found).all()
    step = np.abs(found - exact) / np.abs(np.where(exact == 0, 1, exact))
    last_bit = float(ml_dtypes.finfo(kind).eps)
    assert (found != exact).mean() == pytest.approx(1 / 12, rel=0.05)
    assert step.max() <= last_bit * 1.001 and step[step > 0].min() >= last_bit / 2 * 0.999


def test_float32_activations_and_weights_stay(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    before = {n: v.const_value for n, v in model.graph.initializers.items()}
    nudge(model)
    assert all(v.const_value is before[n] for n, v in model.graph.initializers.items())
    row = np.ones((2, 3), dtype=np.float32)
    assert nudged_values(row, ir.DataType.FLOAT, 0) is row and nudged_values(row, None, 0) is row


def test_a_seed_moves_the_same_numbers_again() -> None:
    once, again, other = (moved(n_bits(4, 32, True, 2, accuracy=None), "b", s)[1] for s in (0, 0, 1))
    assert np.array_equal(once, again) and not np.array_equal(once, other)


def test_moved_numbers_are_as_far_from_a_weight_as_its_rounding() -> None:
    """What the measure rests on: the error of rounding W, and that of moving its numbers, are of one size."""
    w = matrix(D, 512)
    blocks = quantize_blocks(w, 4, 32, symmetric=False)
    model = n_bits(4, 32, True, 2, accuracy=None)
    b = model.graph.initializers["b"]
    packed = pack(blocks.numbers, 4)
    b.const_value, b.shape = ir.tensor(packed, name="b"), ir.Shape(packed.shape)
    _, after = moved(model, "b")
    numbers = unpacked(after, 4).reshape(blocks.numbers.shape)
    values = (numbers - blocks.zeros[..., None].astype(np.float32)) * blocks.scales[..., None]
    rounding = np.linalg.norm(blocks.values() - w.reshape(blocks.numbers.shape))
    assert np.linalg.norm(values - blocks.values()) == pytest.approx(rounding, rel=0.1)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.UINT4, ir.DataType.FLOAT])
def test_weights_in_constant_nodes_move_as_initializers_do(dtype: ir.DataType) -> None:
    numbers = np.random.default_rng(0).integers(1, 15, (64, 64)).astype(dtype.numpy())
    constants = [
        ir.node("Constant", [], attributes={"value": ir.tensor(numbers, dtype=dtype)}, name=f"c{i}")
        for i in range(2)
    ]
    nodes = list(constants)
    if dtype == ir.DataType.UINT4:
        scale = ir.node("Constant", [], attributes={"value": ir.tensor(np.float32(1))}, name="scale")
        nodes += [scale]
        nodes += [ir.node("DequantizeLinear", [c.outputs[0], scale.outputs[0]]) for c in constants]
    for number, value in enumerate(v for node in nodes for v in node.outputs):
        value.name = f"v{number}"
    graph = ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": 21}, name="g")
    nudge(ir.Model(graph, ir_version=10))
    a, b = (c.attributes["value"].as_tensor().numpy().astype(np.float32) for c in constants)
    share = (a != numbers.astype(np.float32)).mean()
    assert share == (0 if dtype == ir.DataType.FLOAT else pytest.approx(1 / 12, rel=0.3))
    assert (a == b).all() == (dtype == ir.DataType.FLOAT)  # each by its own chance


def test_numbers_that_are_moved_in_parts_are_moved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator draws the same numbers in parts, for each kind of weights."""
    generator = np.random.default_rng(0)
    halves = generator.standard_normal((40, 30)).astype(ml_dtypes.bfloat16)
    bytes_, signed = (generator.integers(low, 100, (40, 30)) for low in (0, -100))
    kinds: list[Any] = [
        lambda g: module._moved_halves(halves.T, g),
        lambda g: module._moved_packed(bytes_.astype(np.uint8), 4, g),
        lambda g: module._moved(signed.astype(np.int8), -128, 127, g),
    ]
    whole = [kind(np.random.default_rng(5)) for kind in kinds]
    monkeypatch.setattr(module, "_PART", 7)
    for kind, expected in zip(kinds, whole, strict=True):
        found = kind(np.random.default_rng(5))
        assert found.dtype == expected.dtype and np.array_equal(found.view("u1"), expected.view("u1"))
