"""The figures show the report's numbers: lines, whiskers, bars and marks are read back from the axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nbl_export.linearize.selection import Curve
from nbl_export.report.canvas import BASE, DECODE, LINEAR, style
from nbl_export.report.figures import draw_bench, draw_curve, draw_engines, draw_layers, draw_speed
from nbl_export.report.schema import Report
from nbl_export.settings.budget import NO_BUDGET


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


def cell(phase: str, context: int, base: float, linear: float, resolved: bool = True) -> dict[str, Any]:
    def timing(ms: float) -> dict[str, float]:
        return {"median_ms": ms, "low_ms": ms * 0.9, "high_ms": ms * 1.2}

    return {
        "phase": phase,
        "context": context,
        "base": timing(base),
        "linearized": timing(linear),
        "speedup": base / linear,
        "speedup_low": base / linear - 0.05,
        "speedup_high": base / linear + 0.02,
        "resolved": resolved,
        "ceiling": 1.1,
    }


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_speed_is_the_report_s(narrow: bool) -> None:
    cells = [
        cell("prefill", 128, 100, 80),
        cell("decode", 128, 10, 9.5, resolved=False),
        cell("prefill", 512, 500, 390),
        cell("decode", 512, 12, 10),
    ]
    shown = panels(draw_speed({"cells": cells}, narrow))
    assert list(shown) == ["Prefill, ms", "Decode, ms per token", "Speedup"]
    for phase, axes in zip(("prefill", "decode"), shown.values(), strict=False):
        group = [c for c in cells if c["phase"] == phase]
        base, linear = (c for c in axes.containers if isinstance(c, BarContainer))
        for container, side, colour in ((base, "base", BASE), (linear, "linearized", LINEAR)):
            assert [float(b.get_height()) for b in container] == [c[side]["median_ms"] for c in group]
            assert near(whiskers(container), [(c[side]["low_ms"], c[side]["high_ms"]) for c in group])
            assert {to_hex(b.get_facecolor()) for b in container} == {colour}
        assert [t.get_text() for t in axes.get_xticklabels()] == ["128", "512"]
        assert axes.get_ylim()[0] == 0
    speedups = shown["Speedup"].containers
    drawn = [(line(c)[1][0], whiskers(c)[0], to_hex(c.lines[0].get_color())) for c in speedups]
    ordered = sorted(cells, key=lambda c: (c["phase"] != "prefill", c["context"]))
    for (middle, ends, colour), c in zip(drawn, ordered, strict=True):
        assert middle == c["speedup"] and near(ends, (c["speedup_low"], c["speedup_high"]))
        assert colour == (LINEAR if c["phase"] == "prefill" else DECODE)
    # Hollow, because the noise is larger than the effect.
    hollow = [c.lines[0].get_markerfacecolor() != c.lines[0].get_color() for c in speedups]
    assert hollow == [not c["resolved"] for c in ordered]
    ceilings = [ln for ln in shown["Speedup"].lines if ln.get_marker() == "_"]
    assert len(ceilings) == 4 and all(list(ln.get_ydata()) == [1.1] for ln in ceilings)


def test_an_encoder_has_one_phase() -> None:
    figure = draw_speed({"cells": [cell("encode", 64, 10, 8)]})
    assert list(panels(figure)) == ["Encode, ms", "Speedup"]
    words = [t.get_text() for t in figure.legends[0].get_texts()]
    assert words == ["base", "linearized", "encode speedup", "ceiling"]


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_a_bench_draws_everybody_over_the_base_graph(narrow: bool) -> None:
    """Both graphs of an exporter have one shape, two exporters never the same."""
    others = [
        f"{name}{side}" for name in ("shared", "genai fp32", "K = 8") for side in (", base", ", linearized")
    ]
    rivals = ["dropped", "eager", "compiled", *others, "optimum", "base again"]
    over = {"value": 1.3, "least": 1.2, "most": 1.5, "resolved": False}
    laps = [
        {"name": name, "timing": {"median_ms": ms}, "over_base": None, "ceiling": None}
        for ms, name in enumerate(["base", *rivals], start=10)
    ]
    laps.append({"name": "linearized", "timing": {"median_ms": 8}, "over_base": over, "ceiling": 1.1})
    cells = [
        {"phase": p, "batch": b, "context": 512, "laps": laps} for p in ("prefill", "decode") for b in (1, 4)
    ]
    bases = {name: name.replace("linearized", "base") for name in rivals if "linearized" in name}
    bases |= dict.fromkeys(("linearized", "dropped"), "base")
    competitors = [{"name": lap["name"], "base": bases.get(str(lap["name"]))} for lap in laps]
    figure = draw_bench(cells, competitors, narrow)
    drawn = [t.get_text() for t in figure.legends[0].get_texts()]
    assert drawn == ["linearized", "its ceiling", *rivals]
    for axes in figure.axes:
        assert [t.get_text() for t in axes.get_xticklabels()] == ["512", "4 × 512"]
        own = axes.containers[0]
        assert line(own)[1] == [1.3] and near(whiskers(own), [(1.2, 1.5)])
        assert own.lines[0].get_markerfacecolor() != own.lines[0].get_color()
    shapes: dict[str, Any] = {}
    of_pairs: dict[str, set[Any]] = {}
    for name, point in zip(drawn, figure.legends[0].legend_handles, strict=True):
        if name not in rivals:
            continue
        assert isinstance(point, Line2D)
        assert to_hex(point.get_color()) == (DECODE if "linearized" in name else BASE)
        shapes[name] = point.get_marker()
        of_pairs.setdefault(name.split(", ")[0], set()).add(shapes[name])
    assert all(len(found) == 1 for found in of_pairs.values())
    assert len(set(shapes.values())) == len(of_pairs) == 8
    heights = [float(ln.get_ydata()[0]) for ln in figure.axes[0].lines if ln.get_marker() in shapes.values()]
    assert heights == [10 / lap["timing"]["median_ms"] for lap in laps if lap["name"] in rivals] * 2


@pytest.mark.parametrize("narrow", [False, True], ids=["page", "phone"])
def test_engines_are_the_report_s(engine_speed: dict[str, Any], narrow: bool) -> None:
    figure = draw_engines(engine_speed, narrow)
    names = ["base engine", "linearized engine", "PyTorch eager, base"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == names
    for phase, axes in zip(("prefill", "decode"), figure.axes, strict=True):
        for name, drawn in zip(names, axes.containers, strict=True):
            group = [x for x in engine_speed["latencies"] if x["name"] == name]
            assert line(drawn)[1] == [x[f"{phase}_ms"] for x in group]
            assert near(whiskers(drawn), [(x[f"{phase}_ms"], x[f"{phase}_p99_ms"]) for x in group])
            assert to_hex(drawn.lines[0].get_color()) == (LINEAR if "linearized" in name else BASE)


def test_an_engine_that_missed_a_context_is_drawn_at_its_own(engine_speed: dict[str, Any]) -> None:
    latencies = [x for x in engine_speed["latencies"] if (x["name"][0], x["context"]) != ("P", 128)]
    axes = draw_engines({**engine_speed, "latencies": latencies}).axes[0]
    (x,), (y,) = line(axes.containers[-1])
    assert round(x) == 1 and y == 9.0 * 512 / 100


def test_the_real_report_s_figures_fit(full: Report) -> None:
    """Nothing is drawn outside the figure, on a page or a phone."""
    for narrow in (False, True):
        for draw, section in (
            (draw_curve, full.selection.curve),
            (draw_layers, full.selection),
            (draw_speed, full.speed),
            (draw_engines, full.engine_speed),
        ):
            figure = draw(section, narrow)
            figure.draw_without_rendering()
            box = figure.get_tightbbox()
            width, height = figure.get_size_inches()
            assert box.x0 >= -0.01 and box.y0 >= -0.01, draw
            assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01, draw
