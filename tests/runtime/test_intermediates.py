"""Inner tensors computed piece by piece are those of the whole graph in one session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.runtime import intermediates as pieces_module
from nbl_export.runtime.intermediates import compute_tensors, intermediate_tensors, prefill_rows
from tests.fixtures_graph import pad_left, ragged_rows
from tests.sessions import cpu_session


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The weights of every piece that is run."""
    seen: list[list[str]] = []
    real = pieces_module._session

    def session(proto: Any, *others: Any) -> Any:
        seen.append([t.name for t in proto.graph.initializer])
        return real(proto, *others)

    monkeypatch.setattr(pieces_module, "_session", session)
    return seen


def whole(path: Path, names: list[str], feeds: dict[str, Any]) -> list[Any]:
    """The same tensors by onnxruntime itself, as outputs of the whole graph."""
    model = load_graph(path)
    values = {v.name: v for node in model.graph for v in node.outputs}
    for name in names:
        if not values[name].is_graph_output():
            values[name].type = values[name].type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(values[name])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    runner = cpu_session(model, options)
    return runner.run(names, feeds)  # type: ignore[no-any-return]


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_any_cut_gives_the_same_tensors(tiny_graph: Path, sizes: list[list[str]], limit: int) -> None:
    model = load_graph(tiny_graph)
    regions = [r for r in find_regions(model) if isinstance(r, AttentionRegion)]
    names = [str(v.name) for r in regions for v in (r.x, r.y)] + ["logits", "present.3.value"]
    rows = prefill_rows(model, ragged_rows((9, 4), 260))
    found = compute_tensors(load_graph(tiny_graph), names, rows, limit)
    for row, tensors in zip(rows, found, strict=True):
        for name, expected in zip(names, whole(tiny_graph, names, row), strict=True):
            np.testing.assert_allclose(tensors[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    count = {1: 20, 20_000: 3, 1 << 30: 1}[limit]
    assert len(sizes) >= count and (limit > 1 << 20) == (len(sizes) == 1)
    if limit == 1:  # a piece holds what one node reads, and no weight comes twice but for a tied one
        assert max(map(len, sizes)) <= 4


def test_a_tensor_that_is_given_cuts_what_lies_before_it(tiny_graph: Path, sizes: list[list[str]]) -> None:
    model = load_graph(tiny_graph)
    region = find_regions(model)[2]
    assert isinstance(region, AttentionRegion)
    rows = prefill_rows(model, ragged_rows((6,), 260))
    x = np.random.default_rng(0).standard_normal((1, 6, 32)).astype(np.float32)
    (found,) = compute_tensors(
        load_graph(tiny_graph), [str(region.y.name)], [{**rows[0], str(region.x.name): x}]
    )
    weights = {name for piece in sizes for name in piece}
    assert weights and all("layers.2.self_attn" in n or "layers" not in n for n in weights)
    (other,) = compute_tensors(
        load_graph(tiny_graph), [str(region.y.name)], [{**rows[0], str(region.x.name): 2 * x}]
    )
    assert found[str(region.y.name)].shape == (1, 6, 32)
    assert not np.allclose(found[str(region.y.name)], other[str(region.y.name)])


def test_unknown_tensors_and_graphs_that_do_not_run_are_refused(tiny_graph: Path) -> None:
    rows = prefill_rows(load_graph(tiny_graph), ragged_rows((3,), 260))
    with pytest.raises(InputError, match="has no tensor 'nothing'"):
        compute_tensors(load_graph(tiny_graph), ["nothing"], rows)
    wrong = [{**rows[0], "input_ids": np.full((1, 3), 9999)}]  # no such token
    with pytest.raises(InputError, match="onnxruntime does not run the graph") as caught:
        compute_tensors(load_graph(tiny_graph), ["logits"], wrong)
    assert "\n" not in str(caught.value)


# By hand -----------------------------------------------------------------------------------------


def by_hand(nodes: list[Any], weights: dict[str, Any]) -> ir.Model:
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return ir.from_proto(proto)


def test_computed_weights_are_made_where_they_are_read_and_not_carried(sizes: list[list[str]]) -> None:
    """A weight in another format is as large as itself: it belongs to the piece that multiplies by it."""
    nodes = [
        helper.make_node("Cast", ["a"], ["a.wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["b"], ["b.wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "a.wide"], ["m"]),
        helper.make_node("Mul", ["m", "b.wide"], ["n"]),
        helper.make_node("Sub", ["n", "a.wide"], ["y"]),
    ]
    a, b = np.array([1, 2, 3], dtype=np.int32), np.array([4, 5, 6], dtype=np.int32)
    x = np.array([0.5, 1, 2], dtype=np.float32)
    (found,) = compute_tensors(by_hand(nodes, {"a": a, "b": b}), ["y"], [{"x": x}], partition_bytes=12)
    assert found["y"].tolist() == ((x + a) * b - a).tolist()
    assert sizes == [["a"], ["b"], ["a"]]


def test_branches_read_tensors_from_outside(sizes: list[list[str]]) -> None:
    def branch(name: str, op: str) -> Any:
        node = helper.make_node(op, ["m", "w"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, 1, None)])

    nodes = [
        helper.make_node("Abs", ["x"], ["m"]),
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "limit"], ["large"]),
        helper.make_node(
            "If", ["large"], ["y"], then_branch=branch("t", "Add"), else_branch=branch("e", "Mul")
        ),
    ]
    weights = {"w": np.array([10], dtype=np.float32), "limit": np.float32(5)}
    for x, expected in (([1.0, -2.0], [10.0, 20.0]), ([9.0, -2.0], [19.0, 12.0])):
        feeds = {"x": np.array(x, dtype=np.float32)}
        (found,) = compute_tensors(by_hand(nodes, weights), ["y"], [feeds], partition_bytes=1)
        assert found["y"].tolist() == expected
    assert len(sizes) > 2


def test_taps_are_inner_tensors(stories_out: Path, stories_model: Any) -> None:
    ids, mask, positions = pad_left(ragged_rows((7, 4), 500))
    path = stories_out / "baseline" / "model.onnx"
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    gather = next(
        n for n in onnx.load(str(path), load_external_data=False).graph.node if n.op_type == "Gather"
    )
    name = gather.output[0]
    found = intermediate_tensors(path, [name, "logits", name], inputs)
    assert list(found) == [name, "logits"]
    table = stories_model.get_input_embeddings().weight.numpy()
    kept = mask.astype(bool)
    assert np.array_equal(found[name][kept], table[ids][kept])
    assert not found[name][~kept].any()
    with pytest.raises(InputError, match="has no tensor 'nothing'"):
        intermediate_tensors(path, ["nothing"], inputs)
