"""The tables that several reports share: the graph, the layers, engines, what stays float32, and their order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbl_export.graph.summary import Float32Node, GraphSummary
from nbl_export.records import Check
from nbl_export.report.card import without_paths
from nbl_export.report.schema import Conversion, Report
from nbl_export.report.tables import (
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
    MethodLoss,
    OutputParity,
    StepParity,
)
from tests.engine.conftest import manifest_by_hand


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
