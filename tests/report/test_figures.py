"""The figures show the report's numbers: lines, whiskers, bars and marks are read back from the axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from nbl_export.blocks import Mlp
from nbl_export.linearize.selection import Curve
from nbl_export.report.canvas import BASE, DECODE, LINEAR, style
from nbl_export.report.figures import draw_curve, draw_frontier, draw_layers, draw_speed
from nbl_export.report.schema import Report
from nbl_export.settings.budget import NO_BUDGET
from nbl_export.verify.speed.values import CandidateInfo, CellResult, Machine, Ratio, Result, Speed, Timing


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with style():
        yield


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def line(container: Any) -> tuple[list[float], list[float]]:
    assert isinstance(container, ErrorbarContainer)
    x, y = container.lines[0].get_data()
    return list(x), list(y)


def whiskers(container: Any) -> list[tuple[float, float]]:
    """The ends of each error bar, low and high."""
    errors = container if isinstance(container, ErrorbarContainer) else container.errorbar
    (collection,) = errors.lines[2]
    return [(float(s[0][1]), float(s[1][1])) for s in collection.get_segments()]


def near(a: Any, b: Any) -> bool:
    return bool(np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-12))


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_the_frontier_is_the_report_s(frontier: Curve, narrow: bool) -> None:
    (axes,) = draw_frontier(frontier, narrow).axes
    drawn = [line(c) for c in axes.containers]
    ways = [sorted(way.points, key=lambda p: p.k) for way in frontier.frontier]
    assert drawn == [([p.workload_speedup for p in w], [p.perplexity_ratio for p in w]) for w in ways]
    # The chosen point, filled, and the budget.
    marked = [mark.get_xydata()[0].tolist() for mark in axes.lines if len(mark.get_xydata()) == 1]
    assert marked == [[1.2, 1.08]]
    assert [1.2, 1.2] in [list(mark.get_ydata()) for mark in axes.lines]


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_the_curve_is_the_report_s(curve: Curve, narrow: bool) -> None:
    by_k = sorted(curve.points, key=lambda p: p.k)
    shown = panels(draw_curve(curve, narrow))
    assert list(shown) == ["Perplexity ratio", "KL to the original, nats per token", "Speedup at 512 tokens"]
    for key, axes in zip(("perplexity_ratio", "kl"), shown.values(), strict=False):
        (drawn,) = axes.containers
        x, y = line(drawn)
        assert x == [1, 2, 3, 4] and y == [getattr(p, key) for p in by_k]
        spread = [(getattr(p, key), getattr(p, f"{key}_se")) for p in by_k]
        ends = [(value - se, value + se) for value, se in spread]
        assert near(whiskers(drawn), ends)
        assert list(axes.get_xticks()) == [1, 2, 3, 4]
    prefill, decode = shown["Speedup at 512 tokens"].containers
    assert line(prefill) == ([1, 2, 3, 4], [p.prefill_speedup for p in by_k])
    # The one that was not measured is left out, not drawn as 0.
    assert line(decode) == ([1, 2, 4], [1.05, 1.1, 1.2])


def test_budget_and_choice_are_marked(curve: Curve) -> None:
    bounds = {"perplexity_ratio": 1.2, "kl": 0.5, "prefill_speedup": 1.07}
    for (key, bound), axes in zip(bounds.items(), draw_curve(curve).axes, strict=True):
        level = [ln for ln in axes.lines if list(ln.get_ydata()) == [bound, bound]]
        upright = [ln for ln in axes.lines if list(ln.get_xdata()) == [2, 2]]
        assert len(level) == 1 and upright
        marked = [ln.get_ydata()[0] for ln in axes.lines if list(ln.get_xdata()) == [2]]
        (point,) = (p for p in curve.points if p.k == 2)
        assert getattr(point, key) in marked
        words = [t.get_text() for t in axes.texts]
        assert f"budget: {'at least' if 'speedup' in key else 'at most'} {bound:g}" in words
    none = draw_curve(replace(curve, budget=NO_BUDGET, chosen=None))
    assert not any(t.get_text() for axes in none.axes for t in axes.texts)
    assert draw_curve(Curve(curve.points[:1], 2)).axes  # an older report has no budget at all


def test_bars_of_attention_and_mlps_do_not_cover_each_other(report: Report) -> None:
    own = report.selection.candidates
    both = replace(report.selection, candidates=(*own, *(replace(c, layer=Mlp(c.layer)) for c in own)))
    for selection in (report.selection, both):
        (axes,) = draw_layers(selection).axes
        every = sorted((b.get_x(), b.get_x() + b.get_width()) for c in axes.containers for b in c)  # type: ignore[union-attr]
        assert len(every) == len(selection.candidates)
        assert all(a[1] < b[0] for a, b in pairwise(every))


def test_untimed_curves_have_no_panel_of_speed(curve: Curve) -> None:
    points = tuple(replace(p, prefill_speedup=None, decode_speedup=None) for p in curve.points)
    assert len(draw_curve(replace(curve, points=points, context=None)).axes) == 2
    only = tuple(replace(p, decode_speedup=None) for p in curve.points)
    speedup = draw_curve(replace(curve, points=only)).axes[2]
    assert [t.get_text() for t in speedup.get_legend().get_texts()] == ["prefill"]  # type: ignore[union-attr]


def test_what_is_no_number_leaves_a_gap(curve: Curve) -> None:
    points = tuple(replace(p, kl=math.inf if p.k == 4 else p.kl, kl_se=math.nan) for p in curve.points)
    (drawn,) = draw_curve(replace(curve, points=points)).axes[1].containers
    assert line(drawn)[0] == [1, 2, 3]


@pytest.mark.parametrize(("wide", "scale"), [(9.9, "linear"), (100.0, "log")], ids=["one decade", "two"])
def test_kl_over_decades_has_a_logarithmic_axis(curve: Curve, wide: float, scale: str) -> None:
    points = tuple(replace(p, kl=0.01 if p.k < 4 else 0.01 * wide) for p in curve.points)
    assert draw_curve(replace(curve, points=points)).axes[1].get_yscale() == scale


def bars(container: BarContainer) -> dict[int, float]:
    return {round(b.get_x() + b.get_width() / 2): float(b.get_height()) for b in container}


def test_layers_are_the_report_s(report: Report) -> None:
    for key in ("cca", "nmse"):
        selection = replace(report.selection, criterion=key)
        (axes,) = draw_layers(selection).axes
        replaced, kept = (c for c in axes.containers if isinstance(c, BarContainer))
        scores = {c.layer: getattr(c, key) for c in selection.candidates}
        assert bars(replaced) == {i: scores[i] for i in (2, 3)}
        assert bars(kept) == {i: scores[i] for i in (0, 1, 4)}
        assert {to_hex(b.get_facecolor()) for b in replaced} == {LINEAR}
        assert {to_hex(b.get_facecolor()) for b in kept} == {BASE}
        assert axes.get_ylim()[0] == 0  # bars begin at nought
        assert axes.get_ylabel() == {"cca": "CCA bound", "nmse": "NMSE"}[key]


def test_scores_over_decades_are_points_with_their_errors(report: Report) -> None:
    scores = [1e-4, 3e-3, None, 0.2, math.nan]
    candidates = tuple(
        replace(c, kl=s, kl_se=None if s is None else 1e-5)
        for c, s in zip(report.selection.candidates, scores, strict=True)
    )
    (axes,) = draw_layers(replace(report.selection, criterion="kl", candidates=candidates)).axes
    replaced, kept = axes.containers
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "KL, nats per token"
    assert line(replaced) == ([3], [0.2])
    assert line(kept) == ([0, 1], [1e-4, 3e-3])
    assert axes.yaxis.get_major_formatter()(1e-3) == "0.001"
    assert near(whiskers(kept), [(9e-5, 1.1e-4), (2.99e-3, 3.01e-3)])


def test_layers_chosen_by_hand_are_shown_by_the_paper_s_score(report: Report) -> None:
    (axes,) = draw_layers(replace(report.selection, criterion="manual")).axes
    assert axes.get_ylabel() == "CCA bound"


@pytest.mark.parametrize("layers", [(), (0, 1, 2, 3, 4)], ids=["none", "all"])
def test_none_or_all_layers_replaced(report: Report, layers: tuple[int, ...]) -> None:
    figure = draw_layers(replace(report.selection, layers=layers))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == (["replaced"] if layers else ["kept"])


PAIR = (CandidateInfo("base"), CandidateInfo("linearized", "base"))


def timing(ms: float) -> Timing:
    return Timing(ms, ms * 0.9, ms * 1.2)


def cell(phase: str, context: int, base: float, linear: float, resolved: bool = True) -> CellResult:
    value = base / linear
    over = Ratio(value, value - 0.01, value + 0.01, value - 0.05, value + 0.02, resolved)
    return CellResult(
        phase,
        1,
        context,
        (
            Result("base", timing(base), 7, 1.0),
            Result("linearized", timing(linear), 7, 1.0, over_base=over, ceiling=1.1),
        ),
    )


def speed_of(
    cells: list[CellResult], infos: tuple[CandidateInfo, ...] = PAIR, linearized: str = "linearized"
) -> Speed:
    return Speed(Machine("cpu", 2), 7, infos, tuple(cells), linearized)


def named(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.legends[0].get_texts()]


def hollow(container: Any) -> bool:
    return bool(container.lines[0].get_markerfacecolor() != container.lines[0].get_color())


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_speed_is_the_report_s(narrow: bool) -> None:
    cells = [
        cell("prefill", 128, 100, 80),
        cell("decode", 128, 10, 9.5, resolved=False),
        cell("prefill", 512, 500, 390),
        cell("decode", 512, 12, 10),
    ]
    figure = draw_speed(speed_of(cells), narrow)
    shown = panels(figure)
    assert named(figure) == ["base", "linearized", "ceiling"]
    assert list(shown) == [
        "Prefill, ms",
        "Decode, ms per token",
        "Prefill, times as fast as the base graph",
        "Decode, times as fast as the base graph",
    ]
    for phase in ("prefill", "decode"):
        group = [c for c in cells if c.phase == phase]
        times, over = (axes for title, axes in shown.items() if title.lower().startswith(phase))
        for container, side, colour in zip(times.containers, (0, 1), (BASE, LINEAR), strict=True):
            expected = [c.results[side].timing for c in group]
            assert line(container)[1] == [t.median_ms for t in expected]
            assert near(whiskers(container), [(t.low_ms, t.high_ms) for t in expected])
            assert to_hex(container.lines[0].get_color()) == colour  # type: ignore[attr-defined]
        assert times.get_ylim()[0] == 0
        for axes in (times, over):
            assert [t.get_text() for t in axes.get_xticklabels()] == ["128", "512"]
            assert axes.get_xlabel() == "tokens"
        for drawn, c in zip(over.containers, group, strict=True):
            expected_over = c.results[1].over_base
            assert expected_over and line(drawn)[1] == [expected_over.value]
            assert near(whiskers(drawn), [(expected_over.least, expected_over.most)])
            assert to_hex(drawn.lines[0].get_color()) == LINEAR  # type: ignore[attr-defined]
            # Hollow, because the noise is larger than the effect.
            assert hollow(drawn) is not expected_over.resolved
        ceilings = [ln for ln in over.lines if ln.get_marker() == "_"]
        assert len(ceilings) == 2 and all(list(ln.get_ydata()) == [1.1] for ln in ceilings)


def test_an_interval_without_bounds_has_no_whiskers() -> None:
    one = cell("prefill", 8, 10, 8, resolved=False)
    over = Ratio(1.25, 1.2, 1.3, -math.inf, math.inf, False)
    results = one.results[0], replace(one.results[1], over_base=over)
    (drawn,) = draw_speed(speed_of([replace(one, results=results)])).axes[1].containers
    assert line(drawn)[1] == [1.25] and whiskers(drawn) == [(1.25, 1.25)] and hollow(drawn)


def test_an_encoder_has_one_phase() -> None:
    figure = draw_speed(speed_of([cell("encode", 64, 10, 8)]))
    assert list(panels(figure)) == ["Encode, ms", "Encode, times as fast as the base graph"]
    assert named(figure) == ["base", "linearized", "ceiling"]


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_everybody_is_drawn_over_the_base_graph(narrow: bool) -> None:
    """Both graphs of an exporter have one shape, two exporters never the same."""
    others = [
        f"{name}{side}" for name in ("shared", "genai fp32", "K = 8") for side in (", base", ", linearized")
    ]
    more = ["dropped", "eager", "compiled", *others, "optimum", "base again"]
    over = Ratio(1.3, 1.25, 1.4, 1.2, 1.5, False)
    results = [Result(name, timing(ms), 7, 1.0) for ms, name in enumerate(["base", *more], start=10)]
    results.insert(1, Result("linearized", timing(8), 7, 1.0, over_base=over, ceiling=1.1))
    cells = [CellResult(p, b, 512, tuple(results)) for p in ("prefill", "decode") for b in (1, 4)]
    bases = {name: name.replace("linearized", "base") for name in more if "linearized" in name}
    bases |= dict.fromkeys(("linearized", "dropped"), "base")
    infos = tuple(CandidateInfo(r.name, bases.get(r.name)) for r in results)
    figure = draw_speed(speed_of(cells, infos), narrow)
    assert named(figure) == ["base", "linearized", *more, "ceiling"]
    for axes in figure.axes:
        assert [t.get_text() for t in axes.get_xticklabels()] == ["512", "4 × 512"]
        assert axes.get_xlabel() == "rows × tokens"
    for axes in figure.axes[2:]:
        own = axes.containers[0]
        assert line(own)[1] == [1.3] and near(whiskers(own), [(1.2, 1.5)]) and hollow(own)
    shapes: dict[str, Any] = {}
    of_pairs: dict[str, set[Any]] = {}
    for drawn in figure.axes[0].containers:
        name = named(figure)[len(shapes)]
        (x, *_), (y, *_) = line(drawn)
        assert y == next(r for r in results if r.name == name).timing.median_ms and abs(x) < 0.5
        point = drawn.lines[0]  # type: ignore[attr-defined]
        colour = LINEAR if name == "linearized" else DECODE if "linearized" in name else BASE
        assert to_hex(point.get_color()) == colour
        shapes[name] = point.get_marker()
        of_pairs.setdefault(name.split(", ")[0], set()).add(shapes[name])
    assert all(len(found) == 1 for found in of_pairs.values())
    assert shapes["base"] == shapes["linearized"]
    assert len({shapes[name] for name in more}) == len(of_pairs) - 2 == 8
    marks = {shapes[name] for name in more}
    heights = [float(ln.get_ydata()[0]) for ln in figure.axes[2].lines if ln.get_marker() in marks]
    assert heights == [10 / r.timing.median_ms for r in results if r.name in more] * 2


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_engines_are_the_report_s(engine_speed: Speed, narrow: bool) -> None:
    figure = draw_speed(engine_speed, narrow)
    names = ["base engine", "linearized engine", "PyTorch eager, base"]
    assert named(figure) == names
    for phase, axes in zip(("prefill", "decode"), figure.axes, strict=False):
        for name, drawn in zip(names, axes.containers, strict=True):
            found = [c.of(name) for c in engine_speed.cells if c.phase == phase]
            group = [r.timing for r in found if r]
            assert line(drawn)[1] == [t.median_ms for t in group]
            assert near(whiskers(drawn), [(t.low_ms, t.p99_ms) for t in group])
            colour = drawn.lines[0].get_color()  # type: ignore[attr-defined]
            assert to_hex(colour) == (LINEAR if "linearized" in name else BASE)
    assert figure.axes[2].get_title(loc="left") == "Prefill, times as fast as the base engine"


def test_an_engine_that_missed_a_context_is_drawn_at_its_own(engine_speed: Speed) -> None:
    cells = [
        replace(c, results=tuple(r for r in c.results if (r.name[0], c.context) != ("P", 128)))
        for c in engine_speed.cells
    ]
    axes = draw_speed(replace(engine_speed, cells=tuple(cells))).axes[0]
    (x,), (y,) = line(axes.containers[-1])
    assert round(x) == 1 and y == 9.0 * 512 / 100


def test_times_over_decades_have_a_logarithmic_axis() -> None:
    cells = [cell("prefill", n, ms, ms * 0.8) for n, ms in ((128, 1.0), (8192, 90.0))]
    assert draw_speed(speed_of(cells)).axes[0].get_yscale() == "log"
    assert draw_speed(speed_of(cells[:1])).axes[0].get_yscale() == "linear"


def test_the_real_report_s_figures_fit(full: Report) -> None:
    """Nothing is drawn outside the figure, on a page or a phone."""
    for narrow in (False, True):
        for draw, section in (
            (draw_curve, full.selection.curve),
            (draw_layers, full.selection),
            (draw_speed, full.speed),
            (draw_speed, full.engine_speed),
        ):
            figure = draw(section, narrow)
            figure.draw_without_rendering()
            box = figure.get_tightbbox()
            width, height = figure.get_size_inches()
            assert box.x0 >= -0.01 and box.y0 >= -0.01, draw
            assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01, draw
