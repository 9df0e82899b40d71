"""Which plots a report has, and what each says in words: the same figures, from the values alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.selection import Curve
from nbl_export.report.plots import report_plots, speed_plot
from nbl_export.report.schema import Report
from nbl_export.report.speed import BENCH, ENGINES
from nbl_export.settings import Budget
from nbl_export.settings.budget import NO_BUDGET
from nbl_export.verify.speed.values import Speed

LOADED = """
import sys
from nbl_export import api
from nbl_export.report import render, page, plots, figures, canvas, schema
from pathlib import Path
report = schema.load_report(Path(sys.argv[1]))
known = plots.report_plots(report)
print(sorted(m for m in sys.modules if m.startswith("matplotlib")))
known["layers"].png()
print("matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""


def test_matplotlib_is_loaded_only_to_draw(stories_out: Path) -> None:
    """And never pyplot, which would look for a display."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(stories_out / "report" / "report.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "True False"] and not done.stderr


def test_a_plot_needs_figures(report: Report, full: Report) -> None:
    assert list(report_plots(full)) == ["k-curve", "frontier", "layers", "speed", "engines"]
    assert list(report_plots(report)) == ["layers", "speed"]
    assert full.speed is not None
    unscored = tuple(replace(c, cca=nan) for c in full.selection.candidates)
    none = replace(
        full,
        selection=replace(full.selection, curve=Curve(()), candidates=unscored),
        speed=replace(full.speed, cells=()),
        engine_speed=None,
    )
    assert report_plots(none) == {}
    for name, plot in report_plots(full).items():
        assert plot.name == name and plot.text.endswith(".") and plot.caption.endswith(".")


def test_the_curve_in_words(full: Report, curve: Curve) -> None:
    def words(curve: Curve) -> str:
        return report_plots(replace(full, selection=replace(full.selection, curve=curve)))["k-curve"].text

    said = "Perplexity ratio, KL and speedup for 4 values of K from 1 to 4"
    # 1 + 0.02 K² and 0.01 · 4ᴷ at the K that was chosen, and its speedups.
    assert words(curve) == (
        f"{said}; chosen: K = 2, perplexity ratio 1.080, KL 0.160, prefill 1.20×, decode 1.10×."
    )
    assert "decode" not in words(replace(curve, chosen=3)), "which was not measured there"
    assert words(Curve(curve.points[:1])) == "Perplexity ratio, KL and speedup for K = 2."
    assert words(Curve(untimed(curve.points))) == "Perplexity ratio and KL for 4 values of K from 1 to 4."
    assert words(replace(curve, chosen=None)) == f"{said}."
    assert words(replace(curve, chosen=0)) == f"{said}."


def untimed(points: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
    return tuple(replace(p, prefill_speedup=None, decode_speedup=None) for p in points)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({}, None),
        ({"budget": NO_BUDGET}, "Dashed"),
        # A bound of what has no panel is no line.
        ({"budget": Budget(max_weight_bytes="1GiB")}, "Dashed"),
        ({"chosen": None}, "Filled"),
        ({"chosen": 0}, "Filled"),
    ],
)
def test_a_caption_speaks_of_what_is_drawn(
    full: Report, frontier: Curve, changes: dict[str, Any], gone: str | None
) -> None:
    """And so the K plot as the frontier."""
    known = report_plots(replace(full, selection=replace(full.selection, curve=replace(frontier, **changes))))
    for name in ("k-curve", "frontier"):
        for word in ("Whiskers", "Filled", "Dashed"):
            assert (word in known[name].caption) == (word != gone), (name, word)


def test_a_caption_of_a_curve_without_speeds_or_errors(full: Report, curve: Curve) -> None:
    def caption(curve: Curve) -> str:
        return report_plots(replace(full, selection=replace(full.selection, curve=curve)))["k-curve"].caption

    assert caption(curve).startswith("Perplexity ratio, KL and speedup by the number of layers replaced.")
    quiet = replace(curve, points=untimed(curve.points), budget=Budget(min_speedup=1.07))
    # The bound of a speedup is a line of the panel that is not there.
    assert "speedup" not in caption(quiet) and "Dashed" not in caption(quiet)
    certain = tuple(replace(p, kl_se=None, perplexity_ratio_se=None) for p in curve.points)
    assert "Whiskers" not in caption(replace(curve, points=certain))


def test_the_frontier_in_words(full: Report) -> None:
    assert report_plots(full)["frontier"].text == (
        "Perplexity ratio against the speedup of the workload: both: up to 1.40× at 1.320; attention: up to 1.10× at "
        "1.200; MLPs: up to 1.04× at 1.200; dropped: up to 1.40× at 1.200."
    )


def test_the_layers_in_words(report: Report) -> None:
    scores = [1.5, 0.25, nan, 8.0, inf]
    pairs = zip(report.selection.candidates, scores, strict=True)
    candidates = tuple(replace(c, cca=score) for c, score in pairs)
    selection = replace(report.selection, candidates=candidates, layers=(0, 1, 2, 4))
    assert report_plots(replace(report, selection=selection))["layers"].text == (
        "Scores (CCA bound) of 3 layers, from 0.25 to 8; replaced: 0-2, 4."
    )
    nothing = replace(selection, layers=())
    assert report_plots(replace(report, selection=nothing))["layers"].text.endswith("replaced: none.")


def test_a_race_in_words(engine_speed: Speed) -> None:
    plot = speed_plot(ENGINES, engine_speed)
    assert plot.text == (
        "Times of everything run on A GPU. Linearized over base: prefill 128 1.25×, decode 128 1.25×, "
        "prefill 512 1.25×, decode 512 1.25×."
    )
    assert "lower quartile to the 99th percentile" in plot.caption
    # No ceiling is known of engines, all of these are resolved, and no other is linearized.
    assert not [word for word in ("Hollow", "Dash:", "orange") if word in plot.caption]
    one, *others = engine_speed.cells
    base, found, eager = one.results
    assert found.over_base is not None
    more = replace(found, ceiling=1.1, over_base=replace(found.over_base, resolved=False))
    cells = (replace(one, results=(base, more, replace(eager, name="int4, linearized"))), *others)
    caption = speed_plot(ENGINES, replace(engine_speed, cells=cells)).caption
    assert all(word in caption for word in ("Hollow", "Dash:", "orange"))
    unlike = replace(engine_speed, linearized="another")
    assert speed_plot(BENCH, unlike).text.endswith("Linearized over base: nowhere timed.")
    cells = tuple(
        replace(c, results=tuple(replace(r, timing=replace(r.timing, p99_ms=None)) for r in c.results))
        for c in engine_speed.cells
    )
    assert "quartile to the upper one" in speed_plot(ENGINES, replace(engine_speed, cells=cells)).caption


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_both_forms_have_names_of_their_own(engine_speed: Speed, narrow: bool) -> None:
    svg = speed_plot(ENGINES, engine_speed).svg(narrow)
    assert svg.startswith("<svg") and f' id="engines-{"narrow" if narrow else "wide"}' in svg
