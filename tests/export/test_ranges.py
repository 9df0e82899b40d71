"""The reach of a graph's tensors: PyTorch's activations and NumPy have the same largest magnitudes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from nbl_export.export import ranges as ranges_module
from nbl_export.export.ranges import ranges_of
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.runtime import intermediates
from nbl_export.runtime.intermediates import compute_tensors
from tests.fixtures_graph import pad_left, ragged_rows
from tests.graph.parsed import parsed

VOCAB, BLOCKS = 260, 4


@pytest.fixture(scope="module", params=["concat", "static"])
def graph(request: pytest.FixtureRequest, tiny_graph: Path, static_graph: Path) -> Path:
    return tiny_graph if request.param == "concat" else static_graph


def is_static(path: Path) -> bool:
    return "write_indices" in {i.name for i in onnx.load(str(path), load_external_data=False).graph.input}


def torch_ranges(model: Any, rows: Sequence[Any], right: bool) -> dict[str, list[float]]:
    """Largest magnitudes in PyTorch of what norms read and write, of what linear maps write, and of logits.

    Padding is on the right where it is causally harmless, or on the left under a mask.
    """
    width = max(map(len, rows))
    if right:
        ids = np.stack([np.r_[r, np.zeros(width - len(r), r.dtype)] for r in rows])
        feeds = {"input_ids": ids, "position_ids": np.tile(np.arange(width), (len(rows), 1))}
    else:
        feeds = dict(zip(("input_ids", "attention_mask", "position_ids"), pad_left(rows), strict=True))
    found: dict[str, list[float]] = {"norm in": [], "norm out": [], "map out": []}

    def keep(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            found["map out"].append(output.abs().max().item())
        else:
            found["norm in"].append(args[0].abs().max().item())
            found["norm out"].append(output.abs().max().item())

    kinds = (torch.nn.Linear, type(model.model.norm))
    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.inference_mode():
            tensors = {k: torch.from_numpy(v.astype(np.int64)) for k, v in feeds.items()}
            found["logits"] = [model(**tensors, use_cache=False).logits.abs().max().item()]
    finally:
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("lengths", [(24, 24), (17,), (19, 11, 2)], ids=str)
def test_largest_magnitudes_are_pytorchs(
    graph: Path, tiny_model: torch.nn.Module, lengths: tuple[int, ...]
) -> None:
    rows = ragged_rows(lengths, VOCAB, seed=3)
    found = ranges_of(load_graph(graph), rows)
    expected = torch_ranges(tiny_model, rows, right=is_static(graph))
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    norms = [n for n in nodes if n.op_type == "RMSNormalization"]
    maps = [n for n in nodes if n.op_type == "MatMul"]
    named = {
        "norm in": [n.input[0] for n in norms],
        "norm out": [n.output[0] for n in norms],
        # PyTorch runs q, k, v, o, gate, up, down and the head; the order within a block is the exporter's.
        "map out": [n.output[0] for n in maps],
        "logits": ["logits"],
    }
    assert len(norms) == 2 * BLOCKS + 1 and len(maps) == 7 * BLOCKS + 1
    for kind, names in named.items():
        measured = [found[name] for name in names]
        wanted = expected[kind]
        if kind == "map out":
            measured, wanted = sorted(measured), sorted(wanted)
        np.testing.assert_allclose(measured, wanted, rtol=1e-4, err_msg=kind)
    # They differ, so that one tensor's reach is not another's.
    assert len({round(x, 3) for x in expected["norm in"]}) > BLOCKS


def test_every_float_tensor_is_measured_and_no_other(graph: Path) -> None:
    found = ranges_of(load_graph(graph), ragged_rows((9, 4), VOCAB))
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(graph), load_external_data=False))
    types = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.output)}
    written = [name for node in proto.graph.node for name in node.output if name]
    assert set(found) == {n for n in written if types[n] == onnx.TensorProto.FLOAT}
    assert all(type(value) is float for value in found.values())


def test_the_file_stays_and_nothing_is_left(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[str, Any]:
        return {
            p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for p in graph.parent.iterdir()
        }

    before = state()
    assert set(before) == {"model.onnx", "model.onnx.data"}
    ranges_of(load_graph(graph), ragged_rows((5,), VOCAB))
    assert state() == before

    def fail(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranges_module, "compute_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        ranges_of(load_graph(graph), ragged_rows((5,), VOCAB))
    assert state() == before


# By hand -----------------------------------------------------------------------------------------

STEPS = """steps (int64[b,s] input_ids) => (float[b,s] logits) {
    x = Cast<to = 1>(input_ids)
    low = Sub(x, ten)
    y = Mul(low, scale)
    parity = Mod(input_ids, two)
    logits = Relu(y)
}"""
ROWS = [np.array([3, 8, 12], np.int32), np.array([5, 1], np.int32)]


def reach(tmp_path: Path, scale: Any, rows: Sequence[Any] = ROWS) -> dict[str, float]:
    constants = {"ten": np.float32(10), "scale": np.asarray(scale, np.float32), "two": np.array(2)}
    save_graph(parsed(STEPS, **constants), tmp_path / "model.onnx")
    return dict(ranges_of(load_graph(tmp_path / "model.onnx"), rows))


def test_negative_numbers_and_padding_count(tmp_path: Path) -> None:
    # Padded with token 0: low is -7, -2, 2 and 0 - 10, -5, -9; whole numbers are nobody's matter.
    assert reach(tmp_path, 0.5) == {"x": 12.0, "low": 10.0, "y": 5.0, "logits": 1.0}
    assert reach(tmp_path, 0.5, [ROWS[0]]) == {"x": 12.0, "low": 7.0, "y": 3.5, "logits": 1.0}


def test_a_large_number_among_many_rows_is_found(tmp_path: Path) -> None:
    rows = ragged_rows((200, 150, 90), 1000)
    rows[1][77] = 30_000
    assert reach(tmp_path, 1, rows)["low"] == 29_990


@pytest.mark.parametrize("scale", [3e38, -3e38], ids=str)
def test_overflow_is_infinite(tmp_path: Path, scale: float) -> None:
    found = reach(tmp_path, scale)
    assert found["y"] == float("inf") and found["low"] == 10.0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_infinite_wherever_it_stands(tmp_path: Path, place: int) -> None:
    row = np.array([11, 12, 13], np.int32)
    row[place] = 10
    # Token 10 gives 0 · inf.
    found = reach(tmp_path, np.inf, [row])
    assert found["y"] == float("inf")
    text = (
        "nan (int64[b,s] input_ids) => (float[b,s] logits) { x = Cast<to = 1>(input_ids)\n logits = Sqrt(x) }"
    )
    save_graph(parsed(text), tmp_path / "model.onnx")
    row = np.array([4, 9, 16], np.int32)
    row[place] = -1
    found = dict(ranges_of(load_graph(tmp_path / "model.onnx"), [row]))
    assert found == {"x": max(row), "logits": float("inf")}


# in parts ----------------------------------------------------------------------------------------


def test_parts_give_the_ranges_of_the_whole(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part has few weights, which are in no file before; the ranges are those of one run of all."""
    rows = ragged_rows((19, 11, 2), VOCAB, seed=3)
    whole = ranges_of(load_graph(graph), rows)
    sizes: list[int] = []
    real = intermediates._session

    def session(proto: onnx.ModelProto, folder: Path | None, *others: Any) -> Any:
        sizes.append(sum(int(np.prod(t.dims)) for t in proto.graph.initializer))
        assert folder is not None and len(list(folder.iterdir())) <= 1
        return real(proto, folder, *others)

    monkeypatch.setattr(intermediates, "_session", session)
    monkeypatch.setattr(ranges_module, "compute_tensors", partial(compute_tensors, partition_bytes=20_000))
    scratch = graph.parent / "scratch"
    scratch.mkdir()
    try:
        model = load_graph(graph)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            value.const_value = ir.tensor(tensor.numpy().copy(), name=tensor.name)
        parts = ranges_of(model, rows, scratch)
        assert list(scratch.iterdir()) == []
    finally:
        scratch.rmdir()
    assert len(sizes) > BLOCKS and sum(sizes) > 4 * max(sizes)
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
