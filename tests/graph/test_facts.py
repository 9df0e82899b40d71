"""What a graph file says of itself, counted a second time with onnx alone, and without its weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from nbl_export.errors import InputError
from nbl_export.graph.facts import facts_of, summarize
from nbl_export.graph.io import load_graph
from nbl_export.graph.summary import RewriteSummary, Stored
from nbl_export.linearize.plan import load_plan
from nbl_export.records import from_json
from nbl_export.workspace import Workspace
from tests.folders import copied


def test_facts_are_what_onnx_counts(stories_out: Path) -> None:
    path = stories_out / "model.onnx"
    proto, facts = onnx.load(str(path)), facts_of(path)
    names = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.INT64: "int64",
        onnx.TensorProto.BOOL: "bool",
    }
    counts = Counter(names[t.data_type] for t in proto.graph.initializer)
    sizes: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        sizes[names[tensor.data_type]] += onnx.numpy_helper.to_array(tensor).nbytes
    assert facts.initializers == {name: Stored(counts[name], sizes[name]) for name in counts}
    assert facts.opsets == {"ai.onnx": proto.opset_import[0].version}
    own = [i.name for i in proto.graph.input if not i.name.startswith("past")]
    assert [i.partition(":")[0] for i in facts.inputs] == own
    assert facts.outputs == ("logits: float32[batch_size, num_logits, 512]",)
    assert facts.cache == "float32[batch_size, 4, past_sequence_length, 8]"
    assert facts.summary.nodes == len(proto.graph.node)


def test_linear_layers_are_those_of_the_plan(stories_out: Path) -> None:
    facts, before = (facts_of(stories_out / name) for name in ("model.onnx", "baseline/model.onnx"))
    assert facts.linear == load_plan(stories_out / "nbl" / "plan.json").chosen and len(facts.linear) == 2
    assert before.linear == () and before.kv_layers == (0, 1, 2, 3, 4)
    assert set(facts.kv_layers) == set(before.kv_layers) - set(facts.linear)


def test_no_weight_is_read(stories_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    for name in ("numpy", "tobytes", "_load"):
        assert hasattr(ir.ExternalTensor, name)
        monkeypatch.setattr(ir.ExternalTensor, name, refuse)
    assert facts_of(stories_out / "model.onnx").summary.parameters > 200_000


def saved(path: Path, *shape: object) -> Path:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, shape) for n in "xy")
    if not shape:
        x.type.tensor_type.ClearField("shape")
    text = onnx.helper.make_tensor("t", onnx.TensorProto.STRING, [2], [b"ab", b"c"])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [text])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), str(path))
    return path


def test_a_graph_that_is_no_decoder(tmp_path: Path) -> None:
    facts = facts_of(saved(tmp_path / "g.onnx", 2, None, "n"))
    assert facts.inputs == ("x: float64[2, ?, n]",) and facts.cache == "none"
    assert facts.initializers == {"string": Stored(1, 3)}
    assert (facts.kv_layers, facts.linear) == ((), ())
    assert facts_of(saved(tmp_path / "h.onnx")).inputs == ("x: float64[?]",)


def test_metadata_of_somebody_else_is_refused(stories_out: Path, tmp_path: Path) -> None:
    path = copied(stories_out / "baseline" / "model.onnx", tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    proto.metadata_props.add(key="nbl_export.layers", value="no list")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"The graph's metadata nbl_export.layers was not written by"):
        facts_of(path)


def test_a_summary_counts_what_onnx_counts(tiny_graph: Path) -> None:
    proto = onnx.load(str(tiny_graph))
    summary = summarize(load_graph(tiny_graph), tiny_graph)
    assert summary.nodes == len(proto.graph.node) == sum(summary.ops.values())
    assert summary.ops["Attention"] == summary.kv_pairs == 4
    assert summary.ops["MatMul"] == 4 * 7 + 1  # q, k, v, o, gate, up, down, and the logits
    assert (summary.inputs, summary.outputs) == (len(proto.graph.input), len(proto.graph.output))
    assert summary.initializers == len(proto.graph.initializer)
    assert summary.parameters == sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
    # Keys and values of four layers, two heads of eight float32.
    assert summary.kv_bytes_per_token == 4 * 2 * 2 * 8 * 4
    data = tiny_graph.with_name("model.onnx.data").stat().st_size
    assert summary.file_bytes == tiny_graph.stat().st_size + data
    absent = tiny_graph.with_name("elsewhere.onnx")
    assert summarize(load_graph(tiny_graph), absent).file_bytes == data
    # Of a file in another folder, what the graph reads of it.
    below = tiny_graph.parents[1] / "model.onnx"
    read = {t.name: onnx.numpy_helper.to_array(t).nbytes for t in proto.graph.initializer}
    small = sum(size for size in read.values() if size < 1024)
    assert summarize(load_graph(tiny_graph), below).file_bytes == sum(read.values()) - small


def test_the_record_of_a_rewrite_is_of_the_files_of_the_run(stories_out: Path) -> None:
    ws = Workspace.open(stories_out)
    kept = from_json(RewriteSummary, json.loads(ws.rewrite_summary.read_text()), "it", "do it again")
    for found, path in ((kept.before, ws.baseline), (kept.after, ws.model)):
        assert found == summarize(load_graph(path), path)
    chosen = load_plan(ws.plan).chosen
    assert kept.before.ops["Attention"] - kept.after.ops["Attention"] == len(chosen) == 2
    # q, k, v and o of width 64 went, W and b came.
    assert kept.before.parameters - kept.after.parameters >= 2 * (64 * 64 * 2 + 2 * 64 * 32 - 64 * 64 - 64)
    assert kept.kv_layers == tuple(i for i in range(5) if i not in chosen)
    assert [p.layer for p in kept.proofs] == [0, 1, 2, 3, 4]
    assert all(0 <= error < 1e-4 for p in kept.proofs for error in (p.input_error, p.output_error))
