"""Which plots a report has, what each says in words, and its two forms.

A :class:`Plot` is cheap to make; matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nbl_export.linearize.selection import Curve
from nbl_export.report.canvas import as_png, as_svg
from nbl_export.report.drawing import finite, listed, number
from nbl_export.report.figures import draw_curve, draw_frontier, draw_layers, draw_speed
from nbl_export.report.schema import Report, Selection
from nbl_export.report.selection import Score, scored_by
from nbl_export.report.speed import BENCH, ENGINES, VERIFIED
from nbl_export.verify.speed.values import Speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LAYERS = 1000  # of a plot that can be read; the table has any number
# The plots of a verification; what is not drawn any more is removed by its name. That of a bench is the bench's own.
PLOTS = ("k-curve", "frontier", "layers", VERIFIED, ENGINES)


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
        if selection.curve.others:
            plots.append(_frontier(selection.curve))
    score = scored_by(selection.criterion, selection.candidates)
    drawable = len(selection.candidates) <= _MOST_LAYERS
    if drawable and any(finite(score.of(c)) is not None for c in selection.candidates):
        plots.append(_layers(selection, score))
    races = {VERIFIED: report.speed, ENGINES: report.engine_speed}
    if report.bench:
        races[BENCH] = report.bench.speed
    plots += [speed_plot(race, speed) for race, speed in races.items() if speed and speed.cells]
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


def _frontier(curve: Curve) -> Plot:
    ends = [
        f"{line.name}: up to {number(last.workload_speedup or 1.0, '.2f')}× at {number(last.perplexity_ratio, '.3f')}"
        for line in curve.frontier
        if line.points and (last := max(line.points, key=lambda p: p.k))
    ]
    return Plot(
        "frontier",
        f"Perplexity ratio against the speedup of the workload: {'; '.join(ends)}.",
        "A point is one block more. To the right is faster, below is better. Whiskers: standard errors over documents. "
        "Filled: what was chosen. Dashed: the budget.",
        partial(draw_frontier, curve),
    )


def _layers(selection: Selection, score: Score) -> Plot:
    known = [v for c in selection.candidates if (v := finite(score.of(c))) is not None]
    return Plot(
        "layers",
        f"Scores ({score.name}) of {len(known)} layers, from {min(known):.3g} to {max(known):.3g}; "
        f"replaced: {listed(selection.layers) or 'none'}.",
        f"Score of each layer: {score.name}. Lower is better.",
        partial(draw_layers, selection),
    )


def speed_plot(race: str, speed: Speed) -> Plot:
    """What a race gave, by cell; ``race`` is its name (:mod:`nbl_export.report.speed`)."""
    each = ", ".join(f"{cell.name} {number(over.value, '.2f')}×" for cell, _, over in speed.speedups())
    up_to = "the 99th percentile" if speed.has_percentiles else "the upper one"
    return Plot(
        race,
        f"Times of everything run on {speed.machine.device}. Linearized over base: {each or 'nowhere timed'}.",
        f"Milliseconds: medians, whiskers from the lower quartile to {up_to}. Times as fast as the base: higher is "
        "faster; whiskers: 95 % intervals. Hollow: not resolved from noise. Dash: the ceiling that the graphs' work "
        "allows. Blue: linearized; orange: others that are.",
        partial(draw_speed, speed),
    )
