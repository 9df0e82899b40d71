"""Ranges on real text, and a graph in the precision that they allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nbl_export.export import torch as half_module
from nbl_export.export.torch import ranges_of, save_in_precision
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS
from tests.fixtures_graph import ragged_rows
from tests.graph.parsed import parsed, weight_types

VOCAB, BLOCKS = 260, 4


# By hand -----------------------------------------------------------------------------------------

STEPS = """steps (int64[b,s] input_ids) => (float[b,s] logits) {
    x = Cast<to = 1>(input_ids)
    low = Sub(x, ten)
    y = Mul(low, scale)
    parity = Mod(input_ids, two)
    logits = Relu(y)
}"""
FEW = [np.array([3, 8, 12], np.int32), np.array([5, 1], np.int32)]


def reach(tmp_path: Path, scale: Any, rows: Sequence[Any] = FEW) -> dict[str, float]:
    constants = {"ten": np.float32(10), "scale": np.asarray(scale, np.float32), "two": np.array(2)}
    save_graph(parsed(STEPS, **constants), tmp_path / "model.onnx")
    return dict(ranges_of(load_graph(tmp_path / "model.onnx"), rows))


def test_negative_numbers_and_padding_count(tmp_path: Path) -> None:
    # Padded with token 0: low is -7, -2, 2 and 0 - 10, -5, -9; whole numbers are nobody's matter.
    assert reach(tmp_path, 0.5) == {"x": 12.0, "low": 10.0, "y": 5.0, "logits": 1.0}
    assert reach(tmp_path, 0.5, [FEW[0]]) == {"x": 12.0, "low": 7.0, "y": 3.5, "logits": 1.0}


def test_a_large_number_among_many_rows_is_found(tmp_path: Path) -> None:
    rows = ragged_rows((200, 150, 90), 1000)
    rows[1][77] = 30_000
    assert reach(tmp_path, 1, rows)["low"] == 29_990


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_infinite_wherever_it_stands(tmp_path: Path, place: int) -> None:
    assert reach(tmp_path, 3e38)["y"] == float("inf")
    text = (
        "nan (int64[b,s] input_ids) => (float[b,s] logits) { x = Cast<to = 1>(input_ids)\n logits = Sqrt(x) }"
    )
    save_graph(parsed(text), tmp_path / "model.onnx")
    row = np.array([4, 9, 16], np.int32)
    row[place] = -1
    found = dict(ranges_of(load_graph(tmp_path / "model.onnx"), [row]))
    assert found == {"x": max(row), "logits": float("inf")}


# in a precision ----------------------------------------------------------------------------------


FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


# float16 on rows ---------------------------------------------------------------------------------

DECODER = """decoder (int64[b,s] input_ids) => (float[b,s,4] logits) {
    e = Gather(table, input_ids)
    h = MatMul(e, map)
    r = Relu(h)
    logits = MatMul(r, head)
}"""


def decoder() -> Any:
    """Token 5's embedding is 200; its h is 8 · 200 · 20 = 32,000. Every other token's is a 200th of that."""
    table = np.ones((10, 8), np.float32)
    table[5] = 200
    weights = {"table": table, "map": np.full((8, 4), 20), "head": np.eye(4) / 1000}
    return parsed(DECODER, **{n: w.astype(np.float32) for n, w in weights.items()})


@pytest.mark.parametrize(("token", "wide"), [(5, True), (4, False)])
@pytest.mark.parametrize("where", [(0, 0), (1, 2)], ids=str)
def test_the_rows_decide_what_stays_float32(
    tmp_path: Path, token: int, wide: bool, where: tuple[int, int]
) -> None:
    rows = [np.array([1, 2, 3, 1], np.int32), np.array([7, 8, 9], np.int32)]
    rows[where[0]][where[1]] = token
    _, kept = save_in_precision(decoder(), tmp_path / "model.onnx", PRECISIONS["fp16"], rows)
    assert [k.op for k in kept] == ["MatMul", "Relu", "MatMul"] * wide
    assert [k.reason for k in kept][:2] == ["h reaches 3.2e+04 on real text"] * 2 * wide
    types = weight_types(onnx.load(str(tmp_path / "model.onnx")))
    other = FLOAT if wide else HALF["fp16"]
    assert types == {"table": HALF["fp16"], "map": other, "head": other}


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_float32s_range_needs_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_args: Any, **_more: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(half_module, "ranges_of", fail)
    files, kept = save_in_precision(decoder(), tmp_path / "new" / "model.onnx", PRECISIONS[name], [])
    assert kept == [] and files == [tmp_path / "new" / "model.onnx"]
    expected = HALF["bf16"] if name == "bf16" else FLOAT
    assert set(weight_types(onnx.load(str(files[0]))).values()) == {expected}
