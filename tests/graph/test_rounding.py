"""Half precision emulated node by node, and weights that are moved as rounding moves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.graph.rounding import compute_in_float32, nudge, nudged_values
from nbl_export.rewrite.quantize import pack, quantize_blocks
from tests.graph.parsed import parsed
from tests.graph.quantized import D, dequantized, matrix, n_bits
from tests.sessions import cpu_session

BF16 = ml_dtypes.bfloat16
FLOAT, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16


def is_bf16(array: Any) -> bool:
    """Whether bfloat16 holds every number of a float32 array: the lower half of its bits is zero."""
    assert array.dtype == np.float32
    return bool((np.ascontiguousarray(array).view(np.uint32) & 0xFFFF == 0).all())


def bf16(array: Any) -> torch.Tensor:
    """In PyTorch's bfloat16."""
    return torch.from_numpy(np.array(array, np.float32)).bfloat16()


def run(model: ir.Model, folder: Path, **feeds: Any) -> dict[str, Any]:
    """All outputs of the emulation, by onnxruntime itself."""
    compute_in_float32(model)
    path = folder / "emulated.onnx"
    save_graph(model, path)
    runner = cpu_session(path)
    assert {v.type for v in (*runner.get_inputs(), *runner.get_outputs())} <= {
        "tensor(float)",
        "tensor(int64)",
    }
    return dict(zip([o.name for o in runner.get_outputs()], runner.run(None, feeds), strict=True))


# Small whole numbers and halves: their sums of products are exact in float32 in whatever order they are
# added, so that rounding to bfloat16 has one right result, and most of them are not in bfloat16.
GENERATOR = np.random.default_rng(0)


def exact(*shape: int) -> Any:
    return GENERATOR.integers(-63, 64, shape).astype(np.float32) / 2


X, W, B, V = exact(5, 16), exact(16, 12), exact(12), exact(12, 7)
CHAIN = """chain (bfloat16[n,16] x) => (bfloat16[n,12] a, bfloat16[n,12] b, bfloat16[n,12] c, bfloat16[n,7] d) {
    a = MatMul(x, w)
    b = Add(a, bias)
    c = Mul(b, b)
    d = MatMul(c, v)
}"""


def chain() -> ir.Model:
    return parsed(CHAIN, w=W.astype(BF16), bias=B.astype(BF16), v=V.astype(BF16))


def test_each_node_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    found = run(chain(), tmp_path, x=X)
    x, w, bias, v = (bf16(t) for t in (X, W, B, V))
    a = (x.float() @ w.float()).bfloat16()
    b = (a.float() + bias.float()).bfloat16()
    c = (b.float() * b.float()).bfloat16()
    for name, expected in {"a": a, "b": b, "c": c}.items():
        assert np.array_equal(found[name], expected.float().numpy()), name
    # d's sums are of large squares: not exact in any order, so one unit in the last place is free.
    d = (c.double() @ v.double()).numpy()
    assert is_bf16(found["d"])
    assert (
        np.abs(found["d"] - d)
        <= 2.0**-8 * np.abs(d) + 2.0**-16 * np.abs(c.double() @ v.double().abs()).numpy()
    ).all()
    # The same without looking on, when the runtime may fuse what it likes.
    alone = chain()
    del alone.graph.outputs[:3]
    assert np.array_equal(run(alone, tmp_path, x=X)["d"], found["d"])
    # And rounding happens: float32 all the way gives something else.
    assert not np.array_equal(found["c"], ((X @ W) + B) ** 2)


def test_float32_islands_keep_their_digits(tmp_path: Path) -> None:
    """Softmax between Casts, as a converted graph has it."""
    model = parsed(
        """g (bfloat16[n,4] x) => (float[n,4] p, bfloat16[n,4] q) {
            f = Cast<to = 1>(x)
            p = Softmax(f)
            h = Cast<to = 16>(p)
            q = Add(h, h)
        }"""
    )
    x = np.array([[1, 2, 3, 4], [0, -7, 0.5, 2]], np.float32)
    found = run(model, tmp_path, x=x)
    p = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(found["p"], p, rtol=1e-6)
    assert not is_bf16(found["p"])
    assert np.array_equal(found["q"], 2 * bf16(found["p"]).float().numpy())


# which graphs ------------------------------------------------------------------------------------


# exported ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_graph(tiny_graph)
    to_precision(model, PRECISIONS["bf16"], {})
    path: Path = tmp_path_factory.mktemp("bf16") / "model.onnx"
    save_graph(model, path)
    return path


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
