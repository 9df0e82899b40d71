"""The tables that several reports share: the graph, the layers, engines, what stays float32, and their order."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from nbl_export.blocks import Mlp
from nbl_export.engine.network import NetworkFacts, NetworkTensor
from nbl_export.graph.summary import Float32Node, GraphSummary
from nbl_export.report.schema import Report
from nbl_export.report.summary import headlines
from nbl_export.report.tables import engines_table, graph_table, layers_table, precision_table, report_tables
from tests.engine.conftest import manifest_by_hand


def test_layers_are_labelled_by_what_they_see(report: Report) -> None:
    scores = tuple(replace(c, kind="sliding window") for c in report.selection.candidates)
    rows = layers_table(replace(report.selection, candidates=scores, others={"5": "conv"}), []).rows
    assert [row[1:3] for row in rows] == [
        ("sliding window", "linear" if c.layer in report.selection.layers else "attention")
        for c in sorted(scores, key=lambda c: (c.cca, c.layer))
    ] + [("conv", "no candidate")]


def test_an_mlp_is_named_and_kept_as_an_mlp(report: Report) -> None:
    mlps = tuple(replace(c, layer=Mlp(c.layer), kind="mlp") for c in report.selection.candidates)
    selection = replace(
        report.selection, candidates=(*report.selection.candidates, *mlps), layers=(2, Mlp(3))
    )
    table = layers_table(selection, [])
    assert table.columns[1] == "block" and layers_table(report.selection, []).columns[1] == "attention"
    now = {row[0]: row[1:3] for row in table.rows}
    assert now["2"][1] == now["3.mlp"][1] == "linear"
    assert now["2.mlp"] == ("mlp", "mlp") and now["3"][1] == "attention"
    shown = {line.name: (line.value, line.detail) for line in headlines(replace(report, selection=selection))}
    assert shown["Attention layers replaced"] == ("1 of 5", "layer 2")
    assert shown["MLPs replaced"] == ("1 of 5", "layer 3")


def test_measured_scores_have_a_column_and_unmeasured_layers_come_last(report: Report) -> None:
    scores = [0.5, None, 0.25, inf, 0.75]
    pairs = zip(report.selection.candidates, scores, strict=True)
    candidates = tuple(replace(c, kl=s) for c, s in pairs)
    selection = replace(report.selection, criterion="kl", candidates=candidates, others={"5": "conv"})
    table = layers_table(selection, report.graph.proofs)
    assert table.columns[5] == "KL, nats per token"
    assert "KL: to the original, with only that layer replaced" in table.note
    assert "only that layer replaced" not in layers_table(report.selection, report.graph.proofs).note
    assert [(row[0], row[5]) for row in table.rows] == [
        ("2", "2.5e-1"),
        ("0", "5.0e-1"),
        ("4", "7.5e-1"),
        ("1", ""),
        ("3", "inf"),
        ("5", ""),
    ]
    assert [table.rows[i][0] for i in table.marked] == ["2", "3"]


def test_a_graph_before_and_after() -> None:
    before = GraphSummary(
        2000, {"MatMul": 40, "Softmax": 8, "Add": 3}, 12, 9, 4, 2048, 50, 1_000_000, 3 << 20
    )
    after = replace(
        before,
        nodes=1500,
        ops={"MatMul": 30, "Add": 3, "Gemm": 2},
        kv_pairs=3,
        kv_bytes_per_token=1536,
        inputs=10,
    )
    rows = graph_table(before, after).rows
    assert rows == (
        ("size on disk", "3.0 MiB", "3.0 MiB", "="),
        ("parameters", "1,000,000", "1,000,000", "="),
        ("KV pairs (layers with a cache)", "4", "3", "-25.0%"),
        ("KV cache, bytes per token", "2,048", "1,536", "-25.0%"),
        ("inputs", "12", "10", "-16.7%"),
        ("outputs", "9", "9", "="),
        ("nodes", "2,000", "1,500", "-25.0%"),
        # Operators in order, those alone whose number changed; of a new one there is no percentage.
        ("  Gemm", "0", "2", ""),
        ("  MatMul", "40", "30", "-25.0%"),
        ("  Softmax", "8", "0", "-100.0%"),
    )
    bare = replace(before, kv_pairs=0, kv_bytes_per_token=0)
    assert not any("KV" in row[0] for row in graph_table(bare, bare).rows)


def test_the_proof_of_a_layer_is_its_worse_tensor(report: Report) -> None:
    first, second, *others = report.graph.proofs
    proofs = [
        replace(first, input_error=2e-7, output_error=3e-6),
        replace(second, input_error=inf),
        *others[:1],
    ]
    shown = {row[0]: row[-1] for row in layers_table(report.selection, proofs).rows}
    assert shown[str(first.layer)] == "3.0e-6" and shown[str(second.layer)] == "inf"
    assert [shown[str(p.layer)] for p in others[1:]] == [""] * 2


def test_an_engine_is_a_row() -> None:
    cache = tuple(
        NetworkTensor(name, "HALF", (1,))
        for name in ("past_key_values.0.key", "past_key_values.0.value", "mask")
    )
    base = manifest_by_hand(
        role="base", size=3 << 20, build_seconds=61.26, network=NetworkFacts(1234, 5, 10, cache, (), {})
    )
    bare = manifest_by_hand(kv_layers=(), network=NetworkFacts(7, 0, 0, (), (), {}))
    parts = manifest_by_hand(network=NetworkFacts(7, 0, 0, (), (), {}))
    table = engines_table([base, bare, parts])
    assert table.title == "Engines: tensorrt-rtx 1.7.1.116, fp16, static cache"
    assert table.rows[0] == ("base", "3.0 MiB", "5 fused", "10", "2", "1,234", "61.3")
    assert [row[2:5] for row in table.rows[1:]] == [("none", "", "0"), ("decomposed", "", "0")]
    assert table.note == "Ahead of time for SM86, SM89; batch ≤ 2, prefill ≤ 64 tokens, context ≤ 256."
    here = manifest_by_hand(ahead_of_time=False, capabilities=("SM90",))
    assert engines_table([here]).note.startswith("For SM90;")


def test_nodes_of_one_reason_are_counted_together(report: Report) -> None:
    kept = (
        Float32Node("/a", "Pow", "input 0 reaches 1.2e5 on the calibration text"),
        Float32Node("/b", "Pow", "output 0 reaches 9e4 on the calibration text"),
        Float32Node("/c", "Softmax", "sums need it"),
        Float32Node("/d", "ReduceMean", "input 0 reaches 7e4 on the calibration text"),
    )
    table = precision_table(replace(report.graph, precision="fp16", kept_float32=kept))
    beyond = "reaches beyond the format on the calibration text"
    assert table.rows == (
        ("Pow", "2", beyond, "/a"),
        ("Softmax", "1", "sums need it", "/c"),
        ("ReduceMean", "1", beyond, "/d"),
    )
    assert table.title == "Nodes that stay fp32 in the fp16 graph"


def test_tables_of_a_report_stand_in_their_order(full: Report) -> None:
    kept = (Float32Node("/c", "Softmax", "sums need it"),)
    whole = replace(
        full, engines=(manifest_by_hand(),), graph=replace(full.graph, precision="fp16", kept_float32=kept)
    )
    titles = [table.title.split(":")[0] for table in report_tables(whole)]
    assert titles == [
        "Graph",
        "Loss and speed by K",
        "Loss by speed, each way",
        "Method loss",
        "Speed on ONNX Runtime, batch 1",
        "Parity",
        "Engines",
        "Speed on A GPU, batch 1",
        "Nodes that stay fp32 in the fp16 graph",
        "Layers by cca",
    ]
    # A terminal has no room for long ones, nor for tables wider than it.
    brief = report_tables(whole, brief=True)
    assert [table.title.split(":")[0] for table in brief] == [*titles[:2], *titles[3:-2]]
    assert all(len(row) == len(table.columns) for table in brief for row in table.rows)


def test_layers_for_a_workload_are_in_the_order_of_loss_for_what_they_save(report: Report) -> None:
    first, second, *_ = report.selection.candidates
    scored = (replace(first, kl=0.2, saved_ms=4.0), replace(second, kl=0.1, saved_ms=1.0))
    of = replace(
        report.selection, criterion="kl", candidates=scored, workload=("decode=8@512",), workload_ms=20.46
    )
    table = layers_table(of, [])
    assert [(row[0], row[6]) for row in table.rows] == [(str(first.layer), "4"), (str(second.layer), "1")]
    assert table.columns[6] == "saves, ms"
    assert table.note.endswith(" Workload: decode=8@512: 20.5 ms, at the least, counted from the graph.")
    assert layers_table(replace(of, measured_cost=True), []).note.endswith(": 20.5 ms, measured.")
    assert "A layer's KL" not in layers_table(of, []).note
    assert "A layer's KL is over 1,056 tokens." in layers_table(replace(of, kl_tokens=1056), []).note
    without = replace(of, candidates=tuple(replace(c, saved_ms=None) for c in scored), workload=())
    assert [row[0] for row in layers_table(without, []).rows] == [str(second.layer), str(first.layer)]
