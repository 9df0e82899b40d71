"""The table of the K curve, and the score that layers are shown by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbl_export.report.drawing import finite, spans
from nbl_export.report.schema import Report
from nbl_export.report.selection import curve_points, curve_table, score_key
from nbl_export.report.tables import layers_table, report_tables


def test_every_k_is_a_row(curve: dict[str, Any]) -> None:
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


def test_an_untimed_curve_without_a_budget(curve: dict[str, Any]) -> None:
    points = [{k: p[k] for k in ("k", "layers", "kl", "perplexity_ratio")} for p in curve["points"]]
    table = curve_table({"points": points, "chosen": None})
    assert table.columns == ("K", "perplexity ratio", "KL, nats per token", "layers")
    assert table.rows[0] == ("1", "1.0200", "0.0400", "4")
    assert (table.note, table.marked) == ("", ())


def test_a_report_without_a_curve_has_no_such_table(report: Report, curve: dict[str, Any]) -> None:
    title = "Loss and speed by K"
    for missing in ({}, {"curve": None}, {"curve": {"points": []}}):
        changed = replace(report, selection={**report.selection, **missing})
        assert title not in [t.title for t in report_tables(changed)]
        assert curve_points(changed.selection) == []
    changed = replace(report, selection={**report.selection, "curve": curve})
    assert [t.title for t in report_tables(changed, brief=True)].count(title) == 1


def test_score_by_criterion() -> None:
    candidates = [
        {"layer": 0, "cca": 1.0, "nmse": 0.1, "kl": None},
        {"layer": 1, "cca": 2.0, "nmse": 0.2, "kl": 0.3},
    ]
    for criterion, key in (
        ("cca", "cca"),
        ("nmse", "nmse"),
        ("kl", "kl"),
        ("manual", "cca"),
        ("layer 1", "cca"),
    ):
        assert score_key({"criterion": criterion, "candidates": candidates}) == key
    assert score_key({"criterion": "kl", "candidates": candidates[:1]}) == "cca"


def test_measured_scores_have_a_column_and_unmeasured_layers_come_last(report: Report) -> None:
    scores = [0.5, None, 0.25, "inf", 0.75]
    candidates = [{**c, "kl": s} for c, s in zip(report.selection["candidates"], scores, strict=True)]
    selection = {**report.selection, "criterion": "kl", "candidates": candidates, "others": {"5": "conv"}}
    table = layers_table(selection, report.graph["proofs"])
    assert table.columns[5] == "KL, nats per token"
    assert [(row[0], row[5]) for row in table.rows] == [
        ("2", "2.5e-1"),
        ("0", "5.0e-1"),
        ("4", "7.5e-1"),
        ("1", ""),
        ("3", "inf"),
        ("5", ""),
    ]
    assert [table.rows[i][0] for i in table.marked] == ["2", "3"]


def test_spans() -> None:
    assert spans([]) == "" and spans([4]) == "4"
    assert spans([29, 24, 25, 26, 7, 0, 1]) == "0, 1, 7, 24-26, 29"


def test_finite() -> None:
    assert finite(3) == 3.0 and finite(0) == 0.0
    assert [finite(v) for v in (None, "nan", "inf", float("nan"), float("inf"), True, "1")] == [None] * 7
