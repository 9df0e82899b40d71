"""The table of the K curve, and the score that layers are shown by."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Any

from nbl_export.linearize.selection import Curve, Loss, PlanLoss
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report, Selection
from nbl_export.report.selection import (
    curve_table,
    result_table,
)
from nbl_export.report.tables import report_tables

LOSS = Loss(kl=0.25, kl_se=0.03, excess=0.125, excess_se=0.02)
BEFORE = Loss(kl=0.5, kl_se=0.04, excess=0.25, excess_se=0.05)


def table_of(selection: Selection, **measured: Any) -> Table:
    """The table of what was ``measured`` of the maps."""
    result = PlanLoss(**measured)
    return result_table(replace(selection, result=result), result)


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


def test_the_maps_that_were_kept_have_a_table_where_they_were_measured(report: Report) -> None:
    assert report.selection.result is None
    title = "Loss of the chosen layers, selection text"
    assert title not in [t.title for t in report_tables(report)]
    selection = replace(report.selection, fit="sequential", repair=1500)
    alone = table_of(replace(selection, repair=0), loss=LOSS)
    # The standard error of exp(excess), by the delta method.
    ratio = f"{exp(0.125):.4f} ± {exp(0.125) * 0.02:.4f}"
    assert alone.rows == (("as fitted", ratio, "0.2500 ± 0.0300"),)
    assert "the sequential fit on the normed input" in alone.note and "distillation" not in alone.note
    table = table_of(selection, loss=LOSS, before_repair=BEFORE)
    assert table.rows == (
        ("as fitted", f"{exp(0.25):.4f} ± {exp(0.25) * 0.05:.4f}", "0.5000 ± 0.0400"),
        ("after 1,500 steps of distillation", ratio, "0.2500 ± 0.0300"),
    )
    ranked = replace(selection, rank=96)
    rows = table_of(ranked, loss=LOSS, before_rank=BEFORE).rows
    assert [row[0] for row in rows] == ["as fitted", "of rank 96"]
    rows = table_of(ranked, loss=LOSS, before_rank=LOSS, before_repair=BEFORE).rows
    assert [row[0] for row in rows] == [
        "as fitted",
        "after 1,500 steps of distillation",
        "of rank 96",
    ]
    predicted = table_of(selection, loss=LOSS, predicted_excess=0.1)
    assert predicted.rows == (
        ("as predicted, layer by layer", f"{exp(0.1):.4f}", "–"),
        ("as fitted", *alone.rows[0][1:]),
    )
    selection = replace(selection, result=PlanLoss(loss=LOSS, before_repair=BEFORE))
    for brief in (False, True):
        shown = [t.title for t in report_tables(replace(report, selection=selection), brief)]
        assert shown.count(title) == 1
