"""Summaries of graphs: every count against onnx's own, and as records keep them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph, summarize
from nbl_export.graph.summary import ExportSummary, Float32Node, GraphSummary
from nbl_export.records import from_json, to_json


def test_summary_counts_what_onnx_counts(tiny_graph: Path) -> None:
    proto = onnx.load(str(tiny_graph))
    summary = summarize(load_graph(tiny_graph), tiny_graph)
    assert summary.nodes == len(proto.graph.node) == sum(summary.ops.values())
    assert summary.ops["Attention"] == summary.kv_pairs == 4
    assert (summary.inputs, summary.outputs) == (len(proto.graph.input), len(proto.graph.output))
    assert summary.initializers == len(proto.graph.initializer)
    assert summary.parameters == sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
    assert summary.file_bytes == sum(
        (tiny_graph.parent / n).stat().st_size for n in ("model.onnx", "model.onnx.data")
    )


def test_the_cache_of_a_token_by_hand(tiny_graph: Path) -> None:
    """Keys and values of four layers, two heads of eight float32."""
    summary = summarize(load_graph(tiny_graph), tiny_graph)
    assert summary.kv_bytes_per_token == 4 * 2 * 2 * 8 * 4
    assert summary.ops["MatMul"] == 4 * 7 + 1  # q, k, v, o, gate, up, down, and the logits


def test_a_file_that_is_not_there_has_no_bytes(tiny_graph: Path) -> None:
    found = summarize(load_graph(tiny_graph), tiny_graph.with_name("elsewhere.onnx"))
    assert found.file_bytes == tiny_graph.with_name("model.onnx.data").stat().st_size
    assert replace(found, file_bytes=0) == replace(
        summarize(load_graph(tiny_graph), tiny_graph), file_bytes=0
    )


def test_records_keep_every_count(tiny_graph: Path) -> None:
    summary = summarize(load_graph(tiny_graph), tiny_graph)
    raw = to_json(summary)
    assert from_json(GraphSummary, raw, "it", "do it again") == summary
    # A count that is missing is not taken for nought, nor is half a node one.
    for damaged in (
        {n: v for n, v in raw.items() if n != "nodes"},
        {**raw, "nodes": 1.5},
        {**raw, "edges": 1},
    ):
        with pytest.raises(InputError, match="it is damaged"):
            from_json(GraphSummary, damaged, "it", "do it again")


def test_an_export_keeps_which_nodes_stay_float32_and_why() -> None:
    summary = ExportSummary((Float32Node("node_cos", "Cos", "sensitive to rounding"),))
    raw = to_json(summary)
    kept = [{"node": "node_cos", "op": "Cos", "reason": "sensitive to rounding"}]
    assert raw == {"kept_float32": kept, "copies": []}
    assert from_json(ExportSummary, raw, "it", "do it again") == summary
    # Of a float32 graph, and of those exported before this was kept.
    assert from_json(ExportSummary, {}, "it", "do it again") == ExportSummary()
