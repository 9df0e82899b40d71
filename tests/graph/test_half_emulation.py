"""A bfloat16 graph emulated in float32: every tensor is the one that rounding each float32 result gives."""

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

from nbl_export.graph.half_emulation import compute_in_float32, needs_emulation
from nbl_export.graph.io import load_graph, save_graph, scratch_copy
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.runtime.session import session
from tests.fixtures_graph import ragged_rows
from tests.graph.parsed import parsed
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


def test_an_input_with_more_digits_is_rounded_first(tmp_path: Path) -> None:
    model = parsed(
        "g (bfloat16[n] x) => (bfloat16[n] y, bfloat16[n] z) { y = Identity(x)\n z = Sub(x, c) }",
        c=np.array(1, BF16),
    )
    # Halfway cases go to even; 1 + 2⁻⁹ is lost.
    x = np.array([1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, 3.14159265, -1e-40, 1e38], np.float32)
    found = run(model, tmp_path, x=x)
    rounded = bf16(x)
    assert np.array_equal(found["y"], rounded.float().numpy())
    assert np.array_equal(found["z"], (rounded.float() - 1).bfloat16().float().numpy())
    assert found["y"][0] == 1 and found["z"][0] == 0


CASTS = """casts (int64[n,4] ids, bfloat16[n,4] x) => (float[n,4] wide, bfloat16[n,4] narrow, bfloat16[n,4] whole) {
    whole = Cast<to = 16>(ids)
    sum = Add(x, whole)
    wide = Cast<to = 1>(sum)
    third = Div(wide, three)
    narrow = Cast<to = 16>(third)
}"""


def test_casts_of_the_graph_itself_round_where_they_say(tmp_path: Path) -> None:
    ids = np.array([[1, 257, 1_001, 65_537], [3, 511, 4_099, 70_001]])
    x = np.array([[0.5, 3, -1_000, 7]] * 2, np.float32)
    found = run(parsed(CASTS, three=np.float32(3)), tmp_path, ids=ids, x=x)
    whole = torch.from_numpy(ids).bfloat16()
    total = (bf16(x).float() + whole.float()).bfloat16()
    assert np.array_equal(found["whole"], whole.float().numpy()) and found["whole"][0, 1] == 256
    assert np.array_equal(found["wide"], total.float().numpy())
    assert np.array_equal(found["narrow"], (total.float() / 3).bfloat16().float().numpy())


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


def test_a_weight_read_twice_is_cast_once(tmp_path: Path) -> None:
    model = parsed(
        """g (bfloat16[n,12] x) => (bfloat16[n,12] y, bfloat16[n,12] z) {
            y = Mul(x, w)
            s = Add(y, w)
            z = Mul(s, w)
        }""",
        w=B.astype(BF16),
    )
    found = run(model, tmp_path, x=X[:, :12])
    x, w = bf16(X[:, :12]), bf16(B)
    y = (x.float() * w.float()).bfloat16()
    s = (y.float() + w.float()).bfloat16()
    assert np.array_equal(found["y"], y.float().numpy())
    assert np.array_equal(found["z"], (s.float() * w.float()).bfloat16().float().numpy())
    proto = onnx.load(str(tmp_path / "emulated.onnx"))
    read = Counter((n.input[0], n.attribute[0].i) for n in proto.graph.node if n.op_type == "Cast")
    assert read["w", FLOAT] == 1 and set(read.values()) == {1}
    assert [t.data_type for t in proto.graph.initializer] == [BFLOAT16]


def test_an_output_that_is_read_on_keeps_its_name_and_numbers(tmp_path: Path) -> None:
    """Like a present key, which attention reads too."""
    model = parsed(
        """g (bfloat16[n,4] past, bfloat16[m,4] new) => (bfloat16[t,4] present, float[t,4] logits) {
            present = Concat<axis = 0>(past, new)
            d = Mul(present, present)
            logits = Cast<to = 1>(d)
        }"""
    )
    past, new = X[:2, :4], X[2:, :4] * np.float32(1.01)
    found = run(model, tmp_path, past=past, new=new)
    assert list(found) == ["present", "logits"]
    present = torch.cat([bf16(past), bf16(new)])
    assert np.array_equal(found["present"], present.float().numpy())
    assert np.array_equal(found["logits"], (present.float() ** 2).bfloat16().float().numpy())


# which graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weight", "expected"),
    [
        ("g (float[n] x) => (float[n] y) { y = Mul(x, w) }", np.float32, False),
        ("g (bfloat16[n] x) => (float[n] y) { f = Cast<to = 1>(x)\n y = Mul(f, w) }", np.float32, True),
        ("g (float[n] x) => (float[n] y) { f = Cast<to = 1>(w)\n y = Mul(x, f) }", BF16, True),
        ("g (float[n] x) => (bfloat16[n] y) { f = Mul(x, w)\n y = Cast<to = 16>(f) }", np.float32, True),
    ],
    ids=["float32", "input", "weight", "output"],
)
def test_a_stand_in_is_needed_for_any_bfloat16(
    tmp_path: Path, text: str, weight: Any, expected: bool
) -> None:
    model = parsed(text, w=np.array(3, weight))
    assert needs_emulation(model) == expected
    if expected:
        x = np.array([1.5, -2], np.float32)
        (found,) = run(model, tmp_path, x=x).values()
        assert np.array_equal(found, 3 * x)


# exported ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_graph(tiny_graph)
    to_precision(model, PRECISIONS["bf16"], {})
    path: Path = tmp_path_factory.mktemp("bf16") / "model.onnx"
    save_graph(model, path)
    return path


def test_every_half_tensor_of_an_export_is_bfloat16(exported: Path) -> None:
    before = {p.name: p.read_bytes() for p in exported.parent.iterdir()}
    values = {v.name: v.dtype for node in load_graph(exported).graph for v in node.outputs}
    names = [str(n) for n, dtype in values.items() if dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT)]

    def tap(model: ir.Model) -> None:
        outputs = [v for node in model.graph for v in node.outputs if v.name in names]
        model.graph.outputs.extend(v for v in outputs if not v.is_graph_output())

    with scratch_copy(exported, tap) as tapped:
        runner = session(tapped)
    types = {i.name: i.type for i in runner.get_inputs()}
    assert {t for n, t in types.items() if n.startswith("past")} == {"tensor(float)"}
    rows = np.stack(ragged_rows((9, 9), 260)).astype(np.int64)
    feeds = {
        "input_ids": rows,
        "attention_mask": np.ones_like(rows),
        "position_ids": np.tile(np.arange(9), (2, 1)),
    }
    feeds |= {n: np.zeros((2, 2, 0, 8), np.float32) for n in types if n.startswith("past")}
    found = dict(zip(names, runner.run(names, feeds), strict=True))
    wide = {n for n, value in found.items() if not is_bf16(value)}
    # Only what the graph itself computes in float32: angles, their cosines and sines.
    assert wide <= {n for n in names if values[n] == ir.DataType.FLOAT} and len(wide) >= 2
    assert len(names) - len(wide) > 100 and all(np.isfinite(v).all() for v in found.values())
    assert {p.name: p.read_bytes() for p in exported.parent.iterdir()} == before
