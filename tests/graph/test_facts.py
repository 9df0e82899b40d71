"""What a graph file says of itself, counted a second time with onnx alone, and without its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx

from nbl_export.graph.facts import facts_of, summarize
from nbl_export.graph.io import load_graph
from nbl_export.graph.summary import Stored


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
