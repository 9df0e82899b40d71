"""Which plots a report has, what each says in words, and that the figures show the report's numbers."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from nbl_export.linearize.selection import Curve
from nbl_export.report.plots import Plot, report_plots, speed_plot
from nbl_export.report.schema import Report
from nbl_export.report.speed import ENGINES
from nbl_export.verify.speed.values import Speed


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
