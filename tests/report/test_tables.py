"""The tables that several reports share: the graph, the layers, engines, what stays float32, and their order."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.evaluate.results import (
    Both,
    Compared,
    Depth,
    Estimate,
    MeanRecovery,
    Means,
    RetrievalResult,
    TaskResult,
)
from nbl_export.graph.summary import Float32Node, GraphSummary
from nbl_export.linearize.selection import Curve, Loss, PlanLoss
from nbl_export.models.source import ModelIdentity
from nbl_export.records import Check
from nbl_export.report.drawing import (
    Table,
    ceiling_in_words,
    headlines,
    listed,
    verdict_line,
)
from nbl_export.report.evaluation import (
    NAMES,
    Evaluation,
    evaluation_tables,
    load_evaluation,
    write_evaluation,
)
from nbl_export.report.schema import Report, environment
from nbl_export.report.selection import (
    curve_table,
)
from nbl_export.report.tables import (
    VERIFIED,
    graph_table,
    loss_table,
    parity_table,
    report_tables,
    speed_table,
)
from nbl_export.settings import EvalSettings
from nbl_export.verify.parity.figures import (
    Crossing,
    DecoderParity,
    EncoderParity,
    Gates,
    MethodLoss,
    OutputParity,
    StepParity,
)
from nbl_export.verify.speed.values import (
    CandidateInfo,
    CellResult,
    Machine,
    Ratio,
    Result,
    Roofline,
    Speed,
    Timing,
)
from tests.finished import manifest_by_hand


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


def test_every_k_is_a_row(curve: Curve) -> None:
    table = curve_table(curve)
    assert table.columns == ("K", "perplexity ratio", "KL, nats per token", "prefill", "decode", "layers")
    assert table.rows[0] == ("1", "1.0200 ± 0.0050", "0.0400 ± 0.0010", "1.10×", "1.05×", "4")
    assert table.rows[1][0] == "2, chosen" and table.marked == (1,)
    assert table.rows[2][4:] == ("", "2-4")
    assert table.note == (
        "Loss on 4,096 tokens of 12 documents, ± standard errors over documents. "
        "Speedup of the linearized graph at 512 tokens. "
        "Budget: perplexity ratio ≤ 1.2, KL ≤ 0.5, speedup ≥ 1.07×."
    )
    assert "layers" not in curve_table(curve, brief=True).columns


OVER = Ratio(1.5, 1.4, 1.6, 1.35, 1.65, True)
ROOFLINE = Roofline("CPU", "float32", 2, 5e10, 2e10)
FULL = Result(
    "linearized",
    Timing(8.0, 7.5, 8.5, 9.25),
    21,
    1234.5,
    cache_bytes=3 << 19,
    peak_bytes=300 << 20,
    of_roofline=0.456,
    over_base=OVER,
    ceiling=1.25,
    linearized_over=None,
)
BASE = Result("base", Timing(12.0, 11.0, 13.0), 21, 800.0, linearized_over=replace(OVER, resolved=False))


def race(*cells: CellResult, **changes: Any) -> Speed:
    infos = (CandidateInfo("base"), CandidateInfo("linearized", "base"))
    return replace(Speed(Machine("CPU", 2, roofline=ROOFLINE), 7, infos, cells), **changes)


def shown(table: Table, name: str) -> dict[str, str]:
    """Heading to text, of the first row of that candidate."""
    row = next(row for row in table.rows if row[1] == name)
    return dict(zip(table.columns, row, strict=True))


CELL = CellResult("prefill", 1, 512, (BASE, FULL))


def test_every_figure_stands_under_its_heading() -> None:
    table = speed_table(VERIFIED, race(CELL))
    assert shown(table, "linearized") == {
        "": "prefill 512",
        "candidate": "linearized",
        "ms": "8.00 ± 0.50",
        "p99": "9.25",
        "tokens/s": "1,234",
        "over own base": "1.50×",
        "quartiles": "1.40–1.60",
        "ceiling": "1.25×",
        "of roofline": "46%",
        "cache MiB": "1.5",
        "peak MiB": "300",
        "rounds": "21",
    }
    base = shown(table, "base")
    assert base["ms"] == "12.0 ± 1.0"
    assert [base[name] for name in ("p99", "over own base", "ceiling", "cache MiB")] == [""] * 4


def test_headlines_of_a_whole_report(full: Report) -> None:
    shown = {h.name: h for h in headlines(full)}
    assert shown["Attention layers replaced"].value == "2 of 5"
    assert shown["Attention layers replaced"].detail == "layers 2, 3"
    assert (shown["KV cache"].value, shown["KV cache"].detail) == ("-40.0%", "1,280 → 768 bytes per token")
    assert isinstance(full.method_loss, MethodLoss) and isinstance(full.parity, DecoderParity)
    assert full.speed is not None
    assert shown["Perplexity"].value == f"× {full.method_loss.perplexity_ratio:.3f}"
    _, prefill, over = full.speed.speedups()[0]
    assert shown["Prefill on the CPU"].value == f"{over.value:.2f}×"
    assert shown["Prefill on the CPU"].detail.endswith(f"; {ceiling_in_words(prefill)}")
    assert f"{prefill.ceiling:.2f}×" in ceiling_in_words(prefill)
    assert shown["Decode on the GPU"].value == "1.25×" and "512 tokens" in shown["Decode on the GPU"].detail
    worst = max(s.max_abs for s in full.parity.steps)
    assert abs(float(shown["Parity"].value) / worst - 1) < 0.05


def test_verdict_names_what_it_costs_and_what_was_asked(report: Report) -> None:
    assert isinstance(report.method_loss, MethodLoss)
    loss = replace(report.method_loss, perplexity_ratio=1.5203, kl=0.4182)
    costly = replace(report, method_loss=loss)
    what = "(graph rewrite, parity); perplexity × 1.520, KL 0.42 on held-out text"
    assert verdict_line(costly) == f"{what}, no bound asked"

    def asked(**bound: float | None) -> Report:
        return replace(costly, settings={**costly.settings, "verify": {"bound": bound}})

    assert (
        verdict_line(asked(max_kl=None, max_perplexity_ratio=1.05))
        == f"{what}, at most perplexity × 1.05 asked"
    )
    both = verdict_line(asked(max_kl=0.5, max_perplexity_ratio=2.0))
    assert both == f"{what}, at most perplexity × 2 and KL 0.5 asked"
    nan = replace(costly, method_loss=replace(loss, perplexity_ratio=math.nan, kl=math.inf))
    assert "perplexity × nan, KL inf on held-out text" in verdict_line(nan)


def test_a_loss_beyond_that_of_the_selection_text_is_said_with_what_mends_it(report: Report) -> None:
    measured = report.method_loss
    assert isinstance(measured, MethodLoss)
    chosen = Loss(kl=0.1, kl_se=0.01, excess=math.log(1.1), excess_se=0.05)
    selected = replace(report, selection=replace(report.selection, result=PlanLoss(loss=chosen)))

    def line(ratio: float) -> str:
        loss = replace(measured, perplexity_ratio=ratio, perplexity_ratio_se=0.05 * ratio)
        return verdict_line(replace(selected, method_loss=loss))

    # Two errors of 5 % each: 1.1 · e^0.1 = 1.2157.
    assert "selection text" not in line(1.215)
    assert "(× 1.100 on the selection text: choose on more of it, --selection-samples)" in line(1.217)
    assert "selection text" not in line(math.nan)


def test_blocks_are_listed() -> None:
    assert listed([]) == "" and listed([4]) == "4"
    assert listed([29, 24, 25, 26, 7, 0, 1]) == "0, 1, 7, 24-26, 29"
    assert listed([Mlp(3), 7, Mlp(1), Mlp(2)]) == "7; MLP 1-3" and listed([Mlp(4)]) == "MLP 4"
    assert listed([Span(8, 9), 3, Span(1, 1), Mlp(6)]) == "3; MLP 6; span 1, 8-9"


# evaluation ----------------------------------------------------------------------------------------

COMPARED = Compared(
    chance=0.25,
    base=Estimate(0.8, 0.011),
    linearized=Estimate(0.76, 0.012),
    difference=Estimate(-0.04, 0.013),
    agreement=0.9,
    recovery=Estimate(0.95, 0.014),
    above_chance=Estimate(0.9273, 0.015),
    base_above_chance=True,
)
FRUIT = TaskResult("fruit", "fruit.jsonl", "0", 40, 40, "acc", {"acc": COMPARED}, {"acc": Both(0.8, 0.76)})
WORDS = TaskResult("words", "words.jsonl", "1", 10, 10, None, {}, {"perplexity": Both(12.345, 13.5)})
DEPTHS = (Depth("0 to 25 %", 3, 1.0, 0.667), Depth("75 to 100 %", 3, 0.667, 0.333))
RETRIEVAL = tuple(
    RetrievalResult(n, 6, COMPARED, replace(COMPARED, chance=0.0, recovery=None), DEPTHS) for n in (256, 1024)
)
MEAN = MeanRecovery(1, Estimate(0.95, 0.014), Estimate(0.9273, 0.015), 1)


def evaluation(**changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "created": "now",
        "tool_version": "1.0",
        "model": ModelIdentity("a/model", "folder", None, "0" * 64),
        "environment": environment(),
        "settings": EvalSettings(("fruit.jsonl",)),
        "hashes": {"base": "1"},
        "checks": (),
        "notes": (),
        "tasks": (FRUIT, WORDS),
        "retrieval": RETRIEVAL,
        "mean": Means(MEAN, MEAN),
    }
    return Evaluation(**{**fields, **changes})


def test_an_evaluation_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    for text in ("{", "[]", '{"schema": "nbl-export/eval/0"}', f'{{"schema": "{Evaluation.SCHEMA}"}}'):
        path.write_text(text)
        with pytest.raises(InputError, match="run `nbl-export eval` again"):
            load_evaluation(path)


def test_a_task_is_a_row_with_every_figure_in_its_column() -> None:
    table = evaluation_tables(evaluation())[0]
    assert table.columns == ("", "n", "guess", "base", "linear", "change", "recovery", "above chance")
    assert table.rows == (
        ("fruit, acc", "40", "25", "80.0 ± 1.1", "76.0 ± 1.2", "-4.0 ± 1.3", "95.0 ± 1.4", "92.7 ± 1.5"),
        # A perplexity is no share, and has no recovery.
        ("words, perplexity", "10", "", "12.35", "13.5", "", "", ""),
        ("mean", "", "", "", "", "", "95.0 ± 1.4", "92.7 ± 1.5"),
    )
    assert "over the 1 of 1 where the base is two standard errors above it: 92.7 ± 1.5 %." in table.note
    assert "sample" not in table.note


def test_it_comes_back_from_its_file_and_has_a_suite_only_with_checks(tmp_path: Path) -> None:
    plain, judged = evaluation(), evaluation(checks=(Check("mean recovery", "failed", "95 ± 1 %"),))
    assert [p.name for p in write_evaluation(tmp_path / "a", plain)] == list(NAMES[:2])
    assert [p.name for p in write_evaluation(tmp_path / "b", judged)] == list(NAMES)
    assert load_evaluation(tmp_path / "a" / "eval.json") == plain
    assert load_evaluation(tmp_path / "b" / "eval.json") == judged
    suite = ElementTree.parse(tmp_path / "b" / "eval-junit.xml").getroot().find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert suite.find("testcase/failure") is not None
    (case,) = suite.iter("testcase")
    assert case.get("classname") == "nbl-export_eval-model"
