"""W stored like its neighbours: what the packed numbers stand for, and that onnxruntime reads them so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nbl_export.errors import BuildError
from nbl_export.rewrite.quantize import pack, product, quantize_blocks
from tests.fixtures_graph import cpu_session
from tests.graph.quantized import DYNAMIC, MS, D, dequantized, dynamic, graph, matrix, n_bits

# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32])
def test_every_value_is_met_within_half_a_step(bits: int, symmetric: bool, block: int) -> None:
    w = matrix(5, 40)  # the last block of 32 is filled up
    blocks = quantize_blocks(w, bits, block, symmetric)
    count = -(-40 // block)
    assert blocks.numbers.shape == (5, count, block) and blocks.scales.shape == (5, count)
    assert blocks.numbers.max() <= (1 << bits) - 1
    found = blocks.values().reshape(5, -1)[:, :40]
    step = np.repeat(np.abs(blocks.scales), block, axis=1)[:, :40]
    # Symmetric numbers reach one step less on the side away from the largest value.
    assert (np.abs(found - w) <= step * (1.0 if symmetric else 0.5) * 1.001).all()
    assert not (symmetric and (blocks.zeros != 1 << (bits - 1)).any())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_are_those_of_onnxruntimes_own_quantizer(bits: int, symmetric: bool) -> None:
    from onnxruntime.capi import _pybind_state as native

    w, block = matrix(D, 64), 32
    rows, count = D, 64 // block
    packed = np.zeros((rows, count, block * bits // 8), dtype=np.uint8)
    scales = np.zeros(rows * count, dtype=np.float32)
    zeros = np.zeros(rows * -(-count * bits // 8), dtype=np.uint8)
    quantize = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    quantize(packed, np.ascontiguousarray(w.T), scales, zeros, block, rows, 64, symmetric)
    blocks = quantize_blocks(w, bits, block, symmetric)
    np.testing.assert_allclose(blocks.scales.reshape(-1), scales, rtol=1e-6)
    ours = pack(blocks.numbers, bits)
    # Values that lie in the middle between two numbers are rounded up there, to even here.
    assert (ours != packed).mean() < 0.002
    if not symmetric:
        assert (pack(blocks.zeros, bits).reshape(-1) != zeros).mean() < 0.02


def test_packing_puts_the_first_number_lowest() -> None:
    numbers = np.array([[1, 2, 3]], dtype=np.uint8)
    assert pack(numbers, 4).tolist() == [[0x21, 0x03]]
    assert pack(numbers, 2).tolist() == [[0b111001]]
    assert pack(numbers, 8).tolist() == [[1, 2, 3]]


# Products ----------------------------------------------------------------------------------------


def replaced(model: ir.Model, w: Any) -> dict[str, Any]:
    """Let ``y`` be x · wᵀ, stored like the neighbour's weight; returns the new initializers."""
    neighbour = next(n for n in model.graph if n.name == "neighbour")
    made: dict[str, Any] = {}

    def initialize(
        name: str,
        numbers: Any | Callable[[], Any],
        dtype: ir.DataType,
        shape: tuple[int, ...] | None = None,
    ) -> ir.Value:
        array = numbers() if callable(numbers) else numbers
        assert shape is None or array.shape == shape
        made[name] = tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=f"new.{name}")
        value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(dtype))
        model.graph.register_initializer(value)
        return value

    x = next(v for v in model.graph.inputs if v.name == "x")
    nodes = product(x, lambda: w, w.shape, ir.DataType.FLOAT, neighbour, initialize)
    neighbour.append(nodes)
    model.graph.outputs[0] = nodes[-1].outputs[0]
    nodes[-1].outputs[0].name = "result"
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return made


def run(model: ir.Model, x: Any) -> Any:
    # Its optimizer would round the activations behind a DequantizeLinear to 8 bits.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    runner = cpu_session(model, options)
    return runner.run(["result"], {"x": x})[0]


N_BITS = [
    pytest.param(
        bits, block, zeros, rank, id=f"{bits} bits, {block}, {'zeros' if zeros else 'none'}, {rank}d"
    )
    for bits in (4, 8)
    for block in (16, 32)
    for zeros in (False, True)
    for rank in (1, 2)
]


@pytest.mark.parametrize(("bits", "block", "zeros", "rank"), N_BITS)
def test_a_product_of_n_bits_is_what_its_numbers_say(bits: int, block: int, zeros: bool, rank: int) -> None:
    model, w = n_bits(bits, block, zeros, rank, accuracy=None), matrix()
    made = replaced(model, w)
    assert set(made) == {"weight_quant", "weight_scales", *(["weight_zeros"] if zeros else [])}
    x = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32)
    stands_for = quantize_blocks(w, bits, block, not zeros).values().reshape(D, -1)[:, :D]
    np.testing.assert_allclose(run(model, x), x @ stands_for.T, rtol=0, atol=1e-4)
    near = 0.25 if bits == 4 else 0.02
    assert np.linalg.norm(run(model, x) - x @ w.T) < near * np.linalg.norm(x @ w.T)
    for name, tensor in made.items():
        old = {"weight_quant": "b", "weight_scales": "s", "weight_zeros": "z"}[name]
        twin = model.graph.initializers[old].const_value
        assert twin is not None and (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)


def test_attributes_follow_the_neighbours() -> None:
    model = n_bits(4, 16, False, 2, accuracy=4)
    replaced(model, matrix())
    new = model.graph.outputs[0].producer()
    assert new is not None and new.op_type == "MatMulNBits" and new.domain == MS
    found = {name: attribute.as_int() for name, attribute in new.attributes.items()}
    assert found == {"K": D, "N": D, "bits": 4, "block_size": 16, "accuracy_level": 4}


DEQUANTIZED = [
    pytest.param(dtype, block, zeros, id=f"{TensorProto.DataType.Name(dtype)}, {block}, {zeros}")
    for dtype in (TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8)
    for block in (16, None)
    for zeros in (False, True)
]


@pytest.mark.parametrize(("dtype", "block", "zeros"), DEQUANTIZED)
def test_a_weight_behind_a_dequantize_linear(dtype: int, block: int | None, zeros: bool) -> None:
    model, w = dequantized(dtype, block, zeros), matrix()
    made = replaced(model, w)
    assert made["weight_quant"].dtype == ir.DataType(dtype) and tuple(made["weight_quant"].shape) == (D, D)
    assert tuple(made["weight_scales"].shape) == ((D // block, D) if block else (D,))
    # Numbers without a sign need a zero point to mean anything below zero.
    unsigned = dtype in (TensorProto.UINT4, TensorProto.UINT8)
    assert ("weight_zeros" in made) == (zeros or unsigned)
    x = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32)
    bits = 4 if dtype in (TensorProto.INT4, TensorProto.UINT4) else 8
    near = {4: 0.3, 8: 0.02}[bits]
    assert np.linalg.norm(run(model, x) - x @ w.T) < near * np.linalg.norm(x @ w.T)
    assert (made["weight_scales"].numpy() > 0).all()
    stands_for = quantize_blocks(w, bits, block or D, not zeros, positive=True).values().reshape(D, -1)[:, :D]
    np.testing.assert_allclose(run(model, x), x @ stands_for.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("op", "signed", "each"), DYNAMIC)
def test_a_product_whose_activations_are_quantized_too(op: str, signed: bool, each: bool) -> None:
    model, w = dynamic(op, signed, each), matrix()
    w[3] *= 20  # one output far larger than the others
    made = replaced(model, w)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in made.items()} == {
        "weight_quant": (ir.DataType.INT8 if signed else ir.DataType.UINT8, (D, D)),
        "weight_scale": (ir.DataType.FLOAT, (D,) if each else ()),
        "weight_zero": (ir.DataType.INT8 if signed else ir.DataType.UINT8, (D,) if each else ()),
    }
    numbers, zeros = (made[n].numpy().astype(np.float32) for n in ("weight_quant", "weight_zero"))
    stands_for = (numbers - zeros) * made["weight_scale"].numpy()
    assert np.abs(stands_for - w.T).max() <= made["weight_scale"].numpy().max() * 1.001
    x = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32)
    small = [i for i in range(D) if i != 3]
    found, expected = run(model, x)[:, small], (x @ w.T)[:, small]
    # With one scale for all the large output costs the small ones their digits.
    assert np.linalg.norm(found - expected) < (0.03 if each else 0.3) * np.linalg.norm(expected)
    np.testing.assert_allclose(run(model, x), x @ stands_for, rtol=0, atol=0.02 * np.abs(x @ w.T).max())


# Telling -----------------------------------------------------------------------------------------


def test_what_cannot_be_imitated_is_refused() -> None:
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "w", "a"],
        ["y"],
        domain=MS,
        name="neighbour",
        K=D,
        N=D,
        block_size=16,
        quant_type=1,
    )
    weights = {"w": np.zeros(D * D // 2, np.uint8), "a": np.ones(D * D // 16, np.float32)}
    with pytest.raises(
        BuildError, match="neighbour is a MatMulBnb4, and nbl-export cannot quantize weights in its format"
    ):
        replaced(graph([node], weights), matrix())
    model = n_bits(4, 16, True, 1, None)
    model.graph.initializers["z"].dtype = ir.DataType.FLOAT
    with pytest.raises(BuildError, match="has zero points of FLOAT"):
        replaced(model, matrix())
