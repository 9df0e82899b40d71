"""The tables that several reports share: the graph, the layers, engines, what stays float32, and their order."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

from nbl_export.engine.network import NetworkFacts, NetworkTensor
from nbl_export.graph.summary import Float32Node, GraphSummary
from nbl_export.records import Check
from nbl_export.report.card import without_paths
from nbl_export.report.schema import Conversion, Report
from nbl_export.report.selection import layers_table
from nbl_export.report.tables import (
    engines_table,
    forms_table,
    graph_table,
    loss_table,
    parity_table,
    report_tables,
)
from nbl_export.verify.parity.figures import (
    Crossing,
    DecoderParity,
    EncoderParity,
    Gates,
    Likeness,
    Measure,
    MethodLoss,
    OutputParity,
    StepParity,
)
from tests.engine.conftest import manifest_by_hand


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


def test_tables_of_a_report_stand_in_their_order(full: Report) -> None:
    kept = (Float32Node("/c", "Softmax", "sums need it"),)
    whole = replace(
        full, engines=(manifest_by_hand(),), graph=replace(full.graph, precision="fp16", kept_float32=kept)
    )
    titles = [table.title.split(":")[0] for table in report_tables(whole)]
    assert titles == [
        "Graph",
        "Loss and speed by K",
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
    assert [table.title.split(":")[0] for table in brief] == titles[:-2]
    assert all(len(row) == len(table.columns) for table in brief for row in table.rows)


def test_layers_for_a_workload_are_in_the_order_of_loss_for_what_they_save(report: Report) -> None:
    first, second, *_ = report.selection.candidates
    scored = (replace(first, kl=0.2, saved_ms=4.0), replace(second, kl=0.1, saved_ms=1.0))
    of = replace(
        report.selection, criterion="kl", candidates=scored, workload=("decode=8@512",), workload_ms=20.46
    )
    table = layers_table(of, [])
    assert [(row[0], row[6]) for row in table.rows] == [
        (str(first.layer), "4.0e0"),
        (str(second.layer), "1.0e0"),
    ]
    assert table.columns[6] == "saves, ms"
    assert table.note.endswith(" Workload: decode=8@512: 20.5 ms.")
    assert "A layer's KL" not in layers_table(of, []).note
    assert "A layer's KL is over 1,056 tokens." in layers_table(replace(of, kl_tokens=1056), []).note
    without = replace(of, candidates=tuple(replace(c, saved_ms=None) for c in scored), workload=())
    assert [row[0] for row in layers_table(without, []).rows] == [str(second.layer), str(first.layer)]


FORM = Conversion(
    "gguf/model-F16.gguf",
    3 << 20,
    ("1", "2.mlp"),
    (Check("parity", "passed", "near"), Check("tokens", "failed", "token 3")),
)


def test_a_form_has_a_row_for_each_check_and_fails_with_one(report: Report) -> None:
    with_forms = replace(report, forms={"gguf fp16": FORM})
    (table,) = (t for t in report_tables(with_forms) if t.title == "Other engines")
    assert table == forms_table({"gguf fp16": FORM}) and not FORM.passed
    assert table.rows[1] == ("gguf fp16", FORM.file, "3.0 MiB", "", "tokens", "failed", "token 3")
    assert not without_paths(with_forms).forms, "a package has no such file"


# parity

# Each figure another, so that no column can stand for another.
FIGURES: dict[str, Any] = {
    "tokens": 7,
    "max_abs": 1.1e-3,
    "mean_abs": 1.2e-4,
    "p99_abs": 1.3e-3,
    "max_rel": 1.4e-2,
    "mean_rel": 1.5e-3,
    "p99_rel": 1.6e-2,
    "min_cosine": 1 - 2**-10,  # so that what is left of one is exact: 9.8e-4
    "max_kl": 1.7e-5,
    "top1": 0.998,
    "near_ties": 1,
}
GATES = Gates(max_abs_logit=0.05, min_cosine=0.999, max_kl=1e-3, top1=1.0, near_tie=0.01, max_rel_kv=0.02)


def steps(count: int, **changes: Any) -> tuple[StepParity, ...]:
    return tuple(StepParity(**{**FIGURES, **changes}, step=n, kv_max_rel=1.8e-4) for n in range(count))


def decoder(**changes: Any) -> DecoderParity:
    fields: dict[str, Any] = {"prompt_lengths": (3, 17), "steps": steps(3), "gates": GATES}
    return DecoderParity(**{**fields, "precision": "fp32", "rounding_noise": 2.5e-6, **changes})


def encoder(*outputs: str, **changes: Any) -> EncoderParity:
    found = tuple(OutputParity(**FIGURES, output=name, width=64) for name in outputs)
    fields: dict[str, Any] = {
        "rows": 2,
        "lengths": (5, 9),
        "outputs": found,
        "gates": GATES,
        "precision": "fp32",
    }
    return EncoderParity(**{**fields, **changes})


def test_a_step_is_a_row() -> None:
    table = parity_table(decoder())
    assert [dict(zip(table.columns, row, strict=True)) for row in table.rows[:1]] == [
        {
            "": "prefill",
            "n": "7",
            "max |Δ|": "1.1e-3",
            "mean |Δ|": "1.2e-4",
            "p99 |Δ|": "1.3e-3",
            "max rel": "1.4e-2",
            "mean rel": "1.5e-3",
            "p99 rel": "1.6e-2",
            "1-cos": "9.8e-4",
            "KL": "1.7e-5",
            "top-1": "99.8%",
            "KV rel": "1.8e-4",
        }
    ]
    assert [row[0] for row in table.rows] == ["prefill", "step 1", "step 2"]
    assert "Prompts of 3, 17 tokens" in table.note and "own logits by 2.5e-6." in table.note


def test_gates_that_limit_nothing_are_not_said() -> None:
    only = parity_table(decoder(gates=Gates(max_kl=0.5, top1=1.0)))
    assert only.note.startswith("Gates: max kl 0.5, top1 1. Prompts")
    assert "Gates" not in parity_table(decoder(gates=Gates())).note


def test_what_the_precision_loses_anyway() -> None:
    gates = replace(GATES, max_vs_own=2.0)
    own = (*steps(1, max_abs=0.5, mean_abs=0.25), *steps(1, max_abs=0.75, mean_abs=0.5))
    half = parity_table(decoder(precision="fp16", gates=gates, pytorch_in_precision=own)).note
    assert half.endswith(
        " PyTorch itself in fp16, on the same tokens: max |Δlogit| 7.5e-1, mean 3.8e-1; this graph's mean, 1.2e-4, "
        "may be 2 times that."
    )
    quantized = parity_table(decoder(precision="int4", gates=gates, base_graph=own)).note
    assert "The unmodified int4 graph against unmodified PyTorch" in quantized and "7.5e-1" in quantized
    assert "times that" not in parity_table(decoder()).note


def test_an_output_is_a_row_and_classes_are_of_logits_alone() -> None:
    crossings = (Crossing("local_attention", 128, (1,), "rows", (136,)),)
    table = parity_table(encoder("last_hidden_state", "logits", crossings=crossings))
    assert table.columns[-2:] == ("KL", "top-1") and "KV rel" not in table.columns
    states, logits = table.rows
    assert states[:3] == ("last_hidden_state", "7", "1.1e-3") and states[-2:] == ("", "")
    assert logits[-2:] == ("1.7e-5", "99.8%")
    assert "Texts of 5, 9 tokens, padded to one batch, and of 136 tokens each by itself" in table.note
    assert table.note.endswith("local_attention 128: crossed by the rows.")
    assert "top-1" not in parity_table(encoder("sentence_embedding")).columns
    assert "One batch of 2 images" in parity_table(encoder("pooler_output", lengths=())).note


# loss


def test_loss_of_a_decoder() -> None:
    table = loss_table(MethodLoss(12, 4096, 8.0, 9.0, 1.125, 0.0312, 0.15625, 0.002))
    assert table.rows == (
        ("perplexity, original", "8.000", ""),
        ("perplexity, linearized", "9.000", ""),
        ("perplexity ratio", "1.1250", "± 0.0312"),
        ("KL to the original, nats per token", "0.1562", "± 0.0020"),
    )
    assert "4,096 tokens of 12 documents" in table.note and table.title.endswith("held-out text")


def test_loss_of_an_encoder() -> None:
    measures = (
        Measure("cosine of sentence_embedding", 0.9871, 0.0009, 8),
        Measure("1-R²", 0.0125, 0.00003, 1024),
    )
    table = loss_table(Likeness(8, "images", measures))
    assert table.columns == ("", "mean", "standard error", "n")
    assert table.rows == (
        ("cosine of sentence_embedding", "0.987100", "± 0.000900", "8"),
        ("1-R²", "0.012500", "± 0.000030", "1,024"),
    )
    assert table.title.endswith("held-out images")
    assert table.note.startswith("8 images that calibration did not see") and table.note.endswith(
        "over images."
    )


def test_of_one_document_no_error_is_known() -> None:
    rows = loss_table(MethodLoss(1, 127, 8.0, 9.0, 1.125, 0.0, 0.15625, 0.0)).rows
    assert [row[2] for row in rows] == ["", "", "unknown", "unknown"]
    like = loss_table(Likeness(1, "images", (Measure("cosine of x", 0.9, 0.0, 1),)))
    assert like.rows[0][2] == "unknown"
