"""Which plots a report has, what each says in words, and its two forms.

A :class:`Plot` is cheap to make; matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nbl_export.linearize.selection import Curve
from nbl_export.report.bench import BenchReport, bench_of, cell_name
from nbl_export.report.canvas import as_png, as_svg
from nbl_export.report.drawing import finite, number, spans
from nbl_export.report.figures import draw_bench, draw_curve, draw_engines, draw_layers, draw_speed
from nbl_export.report.schema import Report, Selection
from nbl_export.report.selection import Score, scored_by

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The plots of a verification; what is not drawn any more is removed by its name. That of a bench is the bench's own.
PLOTS = ("k-curve", "layers", "speed", "engines")


@dataclass(frozen=True)
class Plot:
    """One plot: its file's name, what it shows in words, how to read it, and what draws it (narrow or not)."""

    name: str
    text: str
    caption: str
    draw: Callable[[bool], Figure]

    def png(self) -> bytes:
        """The wide form as a PNG file."""
        return as_png(partial(self.draw, False))

    def svg(self, narrow: bool) -> str:
        """One of both forms as an element of a page."""
        return as_svg(partial(self.draw, narrow), f"{self.name}-{'narrow' if narrow else 'wide'}")


def report_plots(report: Report) -> dict[str, Plot]:
    """The plots that there are figures for, by name."""
    plots = []
    selection = report.selection
    if selection.curve and selection.curve.points:
        plots.append(_curve(selection.curve))
    score = scored_by(selection.criterion, selection.candidates)
    if any(finite(score.of(c)) is not None for c in selection.candidates):
        plots.append(_layers(selection, score))
    if report.speed and report.speed["cells"]:
        plots.append(_speed(report.speed))
    if report.engine_speed and report.engine_speed["latencies"]:
        plots.append(_engines(report.engine_speed))
    if report.bench and report.bench["cells"]:
        plots.append(bench_plot(bench_of(report.bench)))
    return {plot.name: plot for plot in plots}


def _curve(curve: Curve) -> Plot:
    points = curve.by_k
    text = f"Perplexity ratio and KL for {len(points)} values of K from {points[0].k} to {points[-1].k}"
    for p in points:
        if p.k == curve.chosen:
            text += (
                f"; chosen: K = {p.k}, perplexity ratio {number(p.perplexity_ratio, '.3f')}, "
                f"KL {number(p.kl, '.3f')}"
            )
    return Plot(
        "k-curve",
        f"{text}.",
        "Whiskers: standard errors over documents. Filled: the K that was chosen. Dashed: the budget.",
        partial(draw_curve, curve),
    )


def _layers(selection: Selection, score: Score) -> Plot:
    known = [v for c in selection.candidates if (v := finite(score.of(c))) is not None]
    return Plot(
        "layers",
        f"Scores ({score.name}) of {len(known)} layers, from {min(known):.3g} to {max(known):.3g}; "
        f"replaced: {spans(selection.layers) or 'none'}.",
        f"Score of each layer: {score.name}. The lower, the better it is replaced.",
        partial(draw_layers, selection),
    )


def _speed(speed: Mapping[str, Any]) -> Plot:
    each = ", ".join(f"{c['phase']} {c['context']} {number(c['speedup'], '.2f')}×" for c in speed["cells"])
    return Plot(
        "speed",
        f"Median speedup of the linearized over the base graph: {each}.",
        "Bars and points: medians; whiskers: quartiles. Hollow: not resolved from noise. Dash: the ceiling that the "
        "graphs' work allows.",
        partial(draw_speed, speed),
    )


def _engines(speed: Mapping[str, Any]) -> Plot:
    each = "; ".join(
        f"{r['context']:.0f} tokens {number(r['prefill'], '.2f')}× prefill, {number(r['decode'], '.2f')}× decode"
        for r in speed["speedups"]
    )
    return Plot(
        "engines",
        f"Times of everything run on the GPU. Base over linearized engine: {each or 'not both timed'}.",
        "Points: medians; whiskers: up to the 99th percentile. Blue: linearized; grey: base.",
        partial(draw_engines, speed),
    )


def bench_plot(value: BenchReport) -> Plot:
    """Speedups over the base graph of everybody, by cell."""
    told = []
    for cell in value.cells:
        own = next((x for x in cell["laps"] if x["name"] == "linearized" and x["over_base"]), None)
        if own:
            told.append(f"{cell_name(cell)} {number(own['over_base']['value'], '.2f')}×")
    return Plot(
        "bench",
        f"Linearized over base: {', '.join(told) or 'nowhere timed'}.",
        "How many times as fast as the base graph; higher is faster. Whiskers: 95 % intervals. Hollow: not resolved "
        "from noise. Dash: the ceiling of the linearized graph.",
        partial(draw_bench, value.cells, value.competitors),
    )
