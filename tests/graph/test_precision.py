"""Half precision in the graph: what becomes half, what stays float32 and why, and that the numbers are right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, graph_precision, to_precision
from nbl_export.graph.rounding import compute_in_float32, nudge, nudged_values
from nbl_export.rewrite.quantize import pack, quantize_blocks
from tests.fixtures_graph import cpu_session
from tests.graph.by_hand import D, casts, dequantized, matrix, n_bits, parsed, weight_types, written

FP16, BF16 = PRECISIONS["fp16"], PRECISIONS["bf16"]
HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
FLOAT = onnx.TensorProto.FLOAT


def run(model: ir.Model, folder: Path, **feeds: Any) -> list[Any]:
    """What ONNX's reference gives: NumPy, every tensor in the type that the graph says.

    onnxruntime has few half kernels on a CPU and computes chains of others in float32.
    """
    written(model, folder)
    with np.errstate(over="ignore", invalid="ignore"):
        return list(ReferenceEvaluator(str(folder / "model.onnx")).run(None, feeds))


GENERATOR = np.random.default_rng(0)
W1 = GENERATOR.standard_normal((8, 16)).astype(np.float32)
B1 = GENERATOR.standard_normal(16).astype(np.float32)
W2 = GENERATOR.standard_normal((16, 6)).astype(np.float32)
X = GENERATOR.standard_normal((5, 8)).astype(np.float16)
MLP = """mlp (float[n,8] x) => (float[n,6] logits) {
    p = MatMul(x, w1)
    h = Add(p, b1)
    s = Sigmoid(h)
    g = Mul(h, s)
    logits = MatMul(g, w2)
}"""


# Numbers -----------------------------------------------------------------------------------------


def test_an_mlp_computes_in_float16_and_nothing_else(tmp_path: Path) -> None:
    model = parsed(MLP, w1=W1, b1=B1, w2=W2)
    assert to_precision(model, FP16, {}) == []
    (found,) = run(model, tmp_path, x=X)
    assert found.dtype == np.float32
    # Rounded weights, exact arithmetic: the weights' rounding is no error of the run.
    w1, b1, w2 = (a.astype(np.float16).astype(np.float64) for a in (W1, B1, W2))
    h = X.astype(np.float64) @ w1 + b1
    exact = (h / (1 + np.exp(-h))) @ w2
    scale = np.abs(h / (1 + np.exp(-h))) @ np.abs(w2)
    assert (np.abs(found - exact) <= 8 * 2.0**-11 * scale + 1e-3).all()
    # Float16 holds every logit exactly, and the error is float16's, not float32's.
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    assert np.abs(found - exact).max() > 1e-5
    types = weight_types(onnx.load(str(tmp_path / "model.onnx")))
    assert sorted(types.values()) == [onnx.TensorProto.FLOAT16] * 3


OVERFLOW = """overflow (float[n,8] x) => (float[n,4] logits) {
    h = MatMul(x, up)
    r = Relu(h)
    y = MatMul(r, down)
    z = MatMul(y, head)
    logits = Add(z, bias)
}"""


def test_a_tensor_out_of_range_is_kept_and_its_numbers_come_out_right(tmp_path: Path) -> None:
    up, down = np.full((8, 8), 300, np.float32), np.full((8, 4), 2.0**-20, np.float32)
    head, bias = np.eye(4, dtype=np.float32), np.arange(4, dtype=np.float32)
    weights = {"up": up, "down": down, "head": head, "bias": bias}
    x = np.full((2, 8), 300, np.float16)
    # Each sum is 8 · 300 · 300 = 720,000, more than eleven times what float16 holds.
    expected = np.full((2, 4), 8 * 720_000 / 2**20) + bias

    blind = parsed(OVERFLOW, **weights)
    assert to_precision(blind, FP16, {}) == []
    assert not np.isfinite(run(blind, tmp_path / "blind", x=x)[0]).any()

    model = parsed(OVERFLOW, **weights)
    kept = to_precision(model, FP16, {"h": 720_000.0, "r": 720_000.0, "y": 5.5, "z": 5.5})
    assert [(k.op, k.reason[0]) for k in kept] == [("MatMul", "h"), ("Relu", "h"), ("MatMul", "r")]
    assert all(k.reason[1:] == " reaches 7.2e+05 on real text" for k in kept)
    (found,) = run(model, tmp_path / "measured", x=x)
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    types = weight_types(onnx.load(str(tmp_path / "measured" / "model.onnx")))
    assert Counter(types.values()) == {FLOAT: 2, onnx.TensorProto.FLOAT16: 2}
    assert types["up"] == types["down"] == FLOAT


CACHE = """cache (float[n,8] x) => (float[n,4] logits, float[n,8] v) {
    v = MatMul(x, up)
    logits = MatMul(v, down)
}"""


@pytest.mark.parametrize(("reach", "said"), [(65_504.0, None), (65_505.0, "65,505"), (float("inf"), "inf")])
def test_a_cache_is_refused_where_another_tensor_would_stay_float32(reach: float, said: str | None) -> None:
    model = parsed(CACHE, up=W1[:, :8], down=W2[:8, :4])
    model.graph.outputs[1].name = "present.1.value"
    ranges = {"present.1.value": reach}
    assert to_precision(model.clone(), BF16, ranges) == []
    if said is None:
        assert [node.op for node in to_precision(model, FP16, ranges)] == ["MatMul", "MatMul"]
        return
    with pytest.raises(BuildError) as caught:
        to_precision(model, FP16, ranges)
    assert str(caught.value) == (
        f"The values of attention layer 1 (present.1.value) reach {said} on real text, and fp16 holds 65,504 at most, "
        "so the KV cache would be infinite: use --precision bf16."
    )


# What stays float32 ------------------------------------------------------------------------------

ANGLES = """angles (int64[n] position, float[n,4] x) => (float[n,4] logits) {
    p = Cast<to = 1>(position)
    column = Unsqueeze(p, axis)
    angle = Mul(column, frequency)
    c = Cos(angle)
    s = Sin(angle)
    a = Mul(x, c)
    b = Mul(x, s)
    logits = Add(a, b)
}"""


@pytest.mark.parametrize("precision", [FP16, BF16], ids=lambda p: p.name)
def test_angles_are_computed_in_float32(tmp_path: Path, precision: Any) -> None:
    frequency = np.array([1, 0.3, 0.01, 0.0007], np.float32)
    model = parsed(ANGLES, axis=np.array([1]), frequency=frequency)
    kept = to_precision(model, precision, {})
    assert Counter(k.op for k in kept) == {"Cos": 1, "Sin": 1, "Mul": 1, "Unsqueeze": 1, "Cast": 1}
    reasons = {k.op: k.reason for k in kept}
    assert reasons["Cos"] == reasons["Sin"] == "sensitive to rounding"
    assert reasons["Mul"] == "leads to Cos, which is sensitive to rounding"
    proto = written(model, tmp_path)
    assert weight_types(proto)["frequency"] == FLOAT
    assert casts(proto)["c", HALF[precision.name]] == casts(proto)["s", HALF[precision.name]] == 1
    if precision is FP16:
        # Beyond 2,048 float16 has no odd numbers; at 100,001 it has infinity only.
        position = np.array([7, 2_049, 4_099, 100_001])
        (found,) = run(model, tmp_path, position=position, x=np.ones((4, 4), np.float16))
        angle = (position[:, None].astype(np.float32) * frequency).astype(np.float64)
        np.testing.assert_allclose(found, np.cos(angle) + np.sin(angle), rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    "op",
    [
        *("Softmax(x)", "LogSoftmax(x)", "Exp(x)", "Log(x)", "Sqrt(x)", "Reciprocal(x)", "Pow(x, two)"),
        *("ReduceMean(x, axis)", "ReduceSum(x, axis)", "ReduceSumSquare(x, axis)", "ReduceL2(x, axis)"),
        "CumSum(x, one)",
    ],
)
def test_sensitive_operators_are_kept_between_casts(tmp_path: Path, op: str) -> None:
    text = f"op (float[n,4] x) => (float[n,m] logits) {{ y = {op}\n logits = Relu(y) }}"
    weights = {"two": np.float32(2), "axis": np.array([-1]), "one": np.array(1)}
    model = parsed(text, **{n: a for n, a in weights.items() if n in op})
    kept = to_precision(model, FP16, {})
    assert [(k.op, k.reason) for k in kept] == [(op.split("(")[0], "sensitive to rounding")]
    proto = written(model, tmp_path)
    half = onnx.TensorProto.FLOAT16
    assert sorted(to for _, to in casts(proto)) == [FLOAT, FLOAT, half]  # x, the logits; y
    assert casts(proto)["x", FLOAT] == casts(proto)["y", half] == 1


# 1e-6 is a subnormal of float16, 1.3 % off; float32's lowest number is taken for bfloat16's, not for infinity.
LOWEST = float(np.finfo(np.float32).min)


def test_what_fills_a_mask_stays_finite(tmp_path: Path) -> None:
    """A row that sees nothing would be NaN after its softmax."""
    model = parsed(
        "g (float[n,4] x) => (float[n,4] logits) { y = Add(x, c)\n logits = Relu(y) }",
        c=np.array([LOWEST, -LOWEST, 1, 0], np.float32),
    )
    to_precision(model, PRECISIONS["bf16"], {})
    (stored,) = written(model, tmp_path).graph.initializer
    most = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert onnx.numpy_helper.to_array(stored).astype(float).tolist() == [-most, most, 1, 0]


def test_a_weight_beyond_the_format_keeps_its_node_and_a_small_entry_does_not(tmp_path: Path) -> None:
    for big, count in ((1e5, 1), (1e-12, 0)):
        w1 = W1.copy()
        w1[2, 3] = big
        model = parsed(MLP, w1=w1, b1=B1, w2=W2)
        kept = to_precision(model, FP16, {})
        assert [k.reason for k in kept] == ["fp16 cannot hold the constant w1"] * count
    # What is in half only keeps its name.
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in written(model, tmp_path).graph.initializer}
    assert set(stored) == {"w1", "b1", "w2"}
    assert np.array_equal(stored["w1"], w1.astype(np.float16))


# Casts and weights, once -------------------------------------------------------------------------

SHARED = """shared (float[n,4] x) => (float[n,4] logits, float[n,4] extra) {
    y = Mul(x, two)
    a = Pow(y, two)
    b = Softmax(y)
    c = Exp(y)
    d = Add(a, b)
    e = Add(a, c)
    f = Mul(d, two)
    logits = Sub(f, e)
    extra = Identity(y)
}"""


def test_each_tensor_is_cast_once_and_each_weight_stored_once_in_each_type(tmp_path: Path) -> None:
    model = parsed(SHARED, two=np.float32(2))
    kept = to_precision(model, FP16, {})
    assert sorted(k.op for k in kept) == ["Exp", "Pow", "Softmax"]
    proto = written(model, tmp_path)
    assert set(casts(proto).values()) == {1}
    half = onnx.TensorProto.FLOAT16
    inner = {k for k in casts(proto) if k[0] in "abcy"}
    assert inner == {("y", FLOAT), ("a", half), ("b", half), ("c", half)}
    # Pow reads the weight in float32, both Muls in half.
    assert sorted(weight_types(proto).values()) == [FLOAT, half]
    x = np.linspace(-1, 1, 8, dtype=np.float16).reshape(2, 4)
    found, extra = run(model, tmp_path, x=x)
    y = 2 * x.astype(np.float64)
    softmax = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, 2 * (y**2 + softmax) - (y**2 + np.exp(y)), rtol=0, atol=2e-2)
    assert extra.dtype == np.float16 and np.array_equal(extra, 2 * x)


def test_control_flow_is_refused() -> None:
    branches = "then_branch = t () => (float[n] a) { a = Relu(x) }, else_branch = e () => (float[n] b) { b = Neg(x) }"
    model = parsed(f"g (bool c, float[n] x) => (float[n] logits) {{ logits = If(c) <{branches}> }}")
    with pytest.raises(
        BuildError, match=r"control flow cannot be converted to bf16: export it without, or in fp32\.$"
    ):
        to_precision(model, BF16, {})


# graph_precision ---------------------------------------------------------------------------------

FIRST = """first (float[n,8] x) => (float[n,6] logits) {
    h = MatMul(x, first)
    s = Relu(h)
    u = MatMul(s, up)
    logits = MatMul(u, down)
}"""


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_the_precision_of_a_graph_is_that_of_its_weights(tmp_path: Path, name: str) -> None:
    """Also where the first linear map had to stay float32, and after a round trip through a file."""
    # With h out of range the narrow matrix stays float32, the wide ones do not.
    for ranges in ({}, {"h": 1e6}):
        model = parsed(FIRST, first=W1[:, :2], up=W1[:2], down=W2)
        kept = to_precision(model, PRECISIONS[name], ranges)
        assert bool(kept) == (name == "fp16" and bool(ranges))
        assert graph_precision(model).name == name
        save_graph(model, tmp_path / "model.onnx")
        assert graph_precision(load_graph(tmp_path / "model.onnx")).name == name


BFLOAT = ml_dtypes.bfloat16


def is_bf16(array: Any) -> bool:
    """Whether bfloat16 holds every number of a float32 array: the lower half of its bits is zero."""
    assert array.dtype == np.float32
    return bool((np.ascontiguousarray(array).view(np.uint32) & 0xFFFF == 0).all())


def bf16(array: Any) -> torch.Tensor:
    """In PyTorch's bfloat16."""
    return torch.from_numpy(np.array(array, np.float32)).bfloat16()


def emulated(model: ir.Model, folder: Path, **feeds: Any) -> dict[str, Any]:
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
NUMBERS = np.random.default_rng(0)


def exact(*shape: int) -> Any:
    return NUMBERS.integers(-63, 64, shape).astype(np.float32) / 2


EXACT_X, EXACT_W, EXACT_B, EXACT_V = exact(5, 16), exact(16, 12), exact(12), exact(12, 7)
CHAIN = """chain (bfloat16[n,16] x) => (bfloat16[n,12] a, bfloat16[n,12] b, bfloat16[n,12] c, bfloat16[n,7] d) {
    a = MatMul(x, w)
    b = Add(a, bias)
    c = Mul(b, b)
    d = MatMul(c, v)
}"""


def chain() -> ir.Model:
    return parsed(CHAIN, w=EXACT_W.astype(BFLOAT), bias=EXACT_B.astype(BFLOAT), v=EXACT_V.astype(BFLOAT))


def test_each_node_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    found = emulated(chain(), tmp_path, x=EXACT_X)
    x, w, bias, v = (bf16(t) for t in (EXACT_X, EXACT_W, EXACT_B, EXACT_V))
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
    assert np.array_equal(emulated(alone, tmp_path, x=EXACT_X)["d"], found["d"])
    # And rounding happens: float32 all the way gives something else.
    assert not np.array_equal(found["c"], ((EXACT_X @ EXACT_W) + EXACT_B) ** 2)


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
    found = emulated(model, tmp_path, x=x)
    p = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(found["p"], p, rtol=1e-6)
    assert not is_bf16(found["p"])
    assert np.array_equal(found["q"], 2 * bf16(found["p"]).float().numpy())


def moved(model: ir.Model, name: str, seed: int = 0) -> tuple[Any, Any]:
    """The values of an initializer before and after."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    before = value.const_value.numpy().copy()
    nudge(model, seed)
    after = value.const_value.numpy()
    assert after.shape == before.shape and after.dtype == before.dtype
    return before, after


def packed(numbers: Any, bits: int) -> list[Any]:
    """The numbers of a MatMulNBits before and after they were moved."""
    model, stored = n_bits(bits, 32, True, 2, accuracy=None), pack(numbers, bits)
    b = model.graph.initializers["b"]
    b.const_value, b.shape = ir.tensor(stored, name="b"), ir.Shape(stored.shape)
    shifts, mask = range(0, 8, bits), (1 << bits) - 1
    return [np.stack([(n >> s) & mask for s in shifts], -1).astype(int) for n in moved(model, "b")]


@pytest.mark.parametrize("bits", [4, 8])
def test_one_packed_number_of_twelve_moves_by_one(bits: int) -> None:
    # More numbers than the fixture has, to count them.
    before, after = packed(quantize_blocks(matrix(512, 512), bits, 32, False).numbers, bits)
    steps = after - before
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
    numbers = packed(blocks.numbers, 4)[1].reshape(blocks.numbers.shape)
    values = (numbers - blocks.zeros[..., None].astype(np.float32)) * blocks.scales[..., None]
    rounding = np.linalg.norm(blocks.values() - w.reshape(blocks.numbers.shape))
    assert np.linalg.norm(values - blocks.values()) == pytest.approx(rounding, rel=0.1)
