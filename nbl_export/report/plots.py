"""Which plots a report has, what each says in words, and its two forms.

A :class:`Plot` is cheap to make; matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nbl_export.report.canvas import as_png, as_svg
from nbl_export.report.drawing import finite, number, spans
from nbl_export.report.figures import draw_curve, draw_layers, draw_speed
from nbl_export.report.schema import Report
from nbl_export.report.selection import SCORES, curve_points, score_key
from nbl_export.report.speed import BENCH, ENGINES, VERIFIED
from nbl_export.verify.speed.values import Speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The plots of a verification; what is not drawn any more is removed by its name. That of a bench is the bench's own.
PLOTS = ("k-curve", "layers", VERIFIED, ENGINES)


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
    if curve_points(report.selection):
        plots.append(_curve(report.selection["curve"]))
    if any(finite(c.get(score_key(report.selection))) is not None for c in report.selection["candidates"]):
        plots.append(_layers(report.selection))
    races = {VERIFIED: report.speed, ENGINES: report.engine_speed}
    if report.bench:
        races[BENCH] = report.bench.speed
    plots += [speed_plot(race, speed) for race, speed in races.items() if speed and speed.cells]
    return {plot.name: plot for plot in plots}


def _curve(curve: Mapping[str, Any]) -> Plot:
    points = curve_points({"curve": curve})
    text = f"Perplexity ratio and KL for {len(points)} values of K from {points[0]['k']} to {points[-1]['k']}"
    for p in points:
        if p["k"] == curve.get("chosen"):
            text += (
                f"; chosen: K = {p['k']}, perplexity ratio {number(p.get('perplexity_ratio'), '.3f')}, "
                f"KL {number(p.get('kl'), '.3f')}"
            )
    return Plot(
        "k-curve",
        f"{text}.",
        "Whiskers: standard errors over documents. Filled: the K that was chosen. Dashed: the budget.",
        partial(draw_curve, curve),
    )


def _layers(selection: Mapping[str, Any]) -> Plot:
    key = score_key(selection)
    known = [v for c in selection["candidates"] if (v := finite(c.get(key))) is not None]
    name = SCORES.get(key, key)
    return Plot(
        "layers",
        f"Scores ({name}) of {len(known)} layers, from {min(known):.3g} to {max(known):.3g}; "
        f"replaced: {spans(selection['layers']) or 'none'}.",
        f"Score of each layer: {name}. The lower, the better it is replaced.",
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
