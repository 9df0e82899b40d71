"""Which plots a report has, what each says in words, and that the figures show the report's numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from nbl_export.blocks import Mlp
from nbl_export.linearize.selection import Curve
from nbl_export.report.plots import Plot, report_plots, speed_plot
from nbl_export.report.schema import Report
from nbl_export.report.speed import BENCH, ENGINES
from nbl_export.verify.speed.values import Speed

LOADED = """
import sys
from nbl_export import api
from nbl_export.report import render, plots, schema
from pathlib import Path
report = schema.load_report(Path(sys.argv[1]))
known = plots.report_plots(report)
print(sorted(m for m in sys.modules if m.startswith("matplotlib")))
known["layers"].file("png")
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


def test_what_a_plot_shows_in_words(full: Report, engine_speed: Speed) -> None:
    plots = report_plots(full)
    # 1 + 0.02 K² and 0.01 · 4ᴷ at the K that was chosen, and its speedups.
    assert plots["k-curve"].text.endswith(
        "Chosen: K = 2, perplexity ratio 1.080, KL 0.160, prefill 1.20×, decode 1.10×."
    )
    assert plots["layers"].text == "CCA bound of 5 layers, lower is better; replaced: 2, 3."
    said = plots["engines"].text
    assert "run on A GPU" in said and "lower quartile to the 99th percentile" in said
    assert "prefill 128 1.25×, decode 128 1.25×, prefill 512 1.25×, decode 512 1.25×" in said
    unlike = replace(engine_speed, linearized="another")
    assert "Linearized over base: nowhere timed" in speed_plot(BENCH, unlike).text


def axes_of(plot: Plot) -> list[Axes]:
    return plot.draw().axes


def line(container: Any) -> tuple[list[float], list[float]]:
    assert isinstance(container, ErrorbarContainer)
    x, y = container.lines[0].get_data()
    return list(x), list(y)


def whiskers(container: Any) -> list[tuple[float, float]]:
    """The ends of each error bar, low and high."""
    (collection,) = container.lines[2]
    return [(float(s[0][1]), float(s[1][1])) for s in collection.get_segments()]


def test_the_curve_is_the_report_s(full: Report, curve: Curve) -> None:
    by_k = sorted(curve.points, key=lambda p: p.k)
    ratio, kl, speed = axes_of(report_plots(full)["k-curve"])
    for key, axes in (("perplexity_ratio", ratio), ("kl", kl)):
        (drawn,) = axes.containers
        assert line(drawn) == ([1, 2, 3, 4], [getattr(p, key) for p in by_k])
        values = [(getattr(p, key), getattr(p, f"{key}_se")) for p in by_k]
        for ends, (value, se) in zip(whiskers(drawn), values, strict=True):
            assert ends == pytest.approx((value - se, value + se))
    prefill, decode = speed.containers
    assert line(prefill)[1] == [p.prefill_speedup for p in by_k]
    # The one that was not measured is left out, not drawn as 0.
    assert str(line(decode)[1]) == str([1.05, 1.1, nan, 1.2])
    for axes, bound in ((ratio, 1.2), (kl, 0.5), (speed, 1.07)):
        assert [bound, bound] in [list(ln.get_ydata()) for ln in axes.lines]
        assert [2, 2] in [list(ln.get_xdata()) for ln in axes.lines], "the K that was chosen"


def test_layers_that_were_replaced_have_a_colour_and_none_covers_another(report: Report) -> None:
    own = report.selection.candidates
    both = replace(report.selection, candidates=(*own, *(replace(c, layer=Mlp(c.layer)) for c in own)))
    for selection in (report.selection, both):
        (axes,) = axes_of(report_plots(replace(report, selection=selection))["layers"])
        replaced, kept = axes.containers
        assert [bar.get_height() for bar in replaced] == [c.cca for c in own if c.layer in (2, 3)]  # type: ignore[union-attr]
        every = sorted((b.get_x(), b.get_x() + b.get_width()) for c in (replaced, kept) for b in c)  # type: ignore[union-attr]
        assert len(every) == len(selection.candidates)
        assert all(a[1] < b[0] for a, b in pairwise(every))
    wide = tuple(replace(c, cca=10.0**i) for i, c in enumerate(own))
    (axes,) = axes_of(
        report_plots(replace(report, selection=replace(report.selection, candidates=wide)))["layers"]
    )
    assert axes.get_yscale() == "log"


def test_a_race_is_drawn_as_it_was_run(engine_speed: Speed) -> None:
    one, *others = engine_speed.cells
    base, found, eager = one.results
    assert found.over_base is not None
    doubted = replace(found, ceiling=1.1, over_base=replace(found.over_base, resolved=False))
    speed = replace(engine_speed, cells=(replace(one, results=(base, doubted, eager)), *others))
    prefill, decode, faster, _ = axes_of(speed_plot(ENGINES, speed))
    times = [line(c)[1] for c in prefill.containers]
    assert times == [pytest.approx([a * 1.28, a * 5.12]) for a in (2.0, 1.6, 9.0)]
    assert whiskers(prefill.containers[0])[0] == pytest.approx((2.56 * 0.95, 2.56 * 1.25))
    assert decode.get_title() == "Decode, ms per token"
    hollow, filled = (c for c in faster.containers)
    assert line(hollow)[1] == line(filled)[1] == [1.25] and whiskers(hollow) == [pytest.approx((1.1, 1.4))]
    faces = [c.lines[0].get_markerfacecolor() for c in (hollow, filled)]
    assert faces[0] == "white" != faces[1]
    assert [1.1] in [list(ln.get_ydata()) for ln in faster.lines], "the ceiling"


@pytest.mark.parametrize("bad", [nan, inf])
def test_what_is_no_number_leaves_a_gap(full: Report, bad: float) -> None:
    curve = full.selection.curve
    assert curve and full.speed
    points = tuple(replace(p, kl=bad, perplexity_ratio_se=bad, prefill_speedup=bad) for p in curve.points)
    cells = tuple(
        replace(c, results=tuple(replace(r, timing=replace(r.timing, median_ms=bad)) for r in c.results))
        for c in full.speed.cells
    )
    selection = replace(full.selection, curve=replace(curve, points=points))
    broken = replace(full, selection=selection, speed=replace(full.speed, cells=cells))
    for plot in report_plots(broken).values():
        assert plot.file("png").startswith(b"\x89PNG"), plot.name


def test_the_same_plot_gives_the_same_bytes_and_names_are_text(engine_speed: Speed) -> None:
    evil = "<b>$x$\x1b[2J"
    cells = tuple(
        replace(c, results=(*c.results[:2], replace(c.results[2], name=evil))) for c in engine_speed.cells
    )
    candidates = (*engine_speed.candidates[:2], replace(engine_speed.candidates[2], name=evil))
    plot = speed_plot(ENGINES, replace(engine_speed, cells=cells, candidates=candidates))
    drawn = plot.file("svg")
    assert drawn == plot.file("svg") and b"<b>" not in drawn and b"\x1b" not in drawn
