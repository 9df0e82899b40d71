"""Which plots a report has, what each says in words, and its two forms.

A :class:`Plot` is cheap to make; matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nbl_export.batch.names import LINEARIZED
from nbl_export.linearize.selection import Curve
from nbl_export.report.canvas import as_png, as_svg
from nbl_export.report.drawing import finite, listed, number
from nbl_export.report.figures import (
    bounds_of,
    draw_curve,
    draw_frontier,
    draw_layers,
    draw_speed,
    speedups_of,
)
from nbl_export.report.schema import Report, Selection
from nbl_export.report.selection import Score, scored_by
from nbl_export.report.speed import BENCH, ENGINES, VERIFIED
from nbl_export.verify.speed.values import Speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WHISKERS, _DASHED = "Whiskers: standard errors over documents.", "Dashed: the budget."
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
    speedups = speedups_of(points)
    what = f"Perplexity ratio{', KL and speedup' if speedups else ' and KL'}"
    first, last = points[0].k, points[-1].k
    text = f"{what} for " + (
        f"{len(points)} values of K from {first} to {last}" if len(points) > 1 else f"K = {first}"
    )
    for p in points:
        if p.k == curve.chosen:
            gains = ((name, finite(speedup.of(p))) for name, speedup in speedups.items())
            text += (
                f"; chosen: K = {p.k}, perplexity ratio {number(p.perplexity_ratio, '.3f')}, "
                f"KL {number(p.kl, '.3f')}"
                + "".join(f", {name} {gain:.2f}×" for name, gain in gains if gain is not None)
            )
    shown = ("perplexity_ratio", "kl", *["speedup"] * bool(speedups))
    return Plot(
        "k-curve",
        f"{text}.",
        _sentences(
            f"{what} by the number of layers replaced.",
            _WHISKERS if any(finite(p.perplexity_ratio_se) or finite(p.kl_se) for p in points) else "",
            "Filled: the K that was chosen." if any(p.k == curve.chosen for p in points) else "",
            _DASHED if bounds_of(curve, shown) else "",
        ),
        partial(draw_curve, curve),
    )


def _sentences(*parts: str) -> str:
    """Those of a caption whose lines and marks are drawn; the others are empty."""
    return " ".join(filter(None, parts))


def _frontier(curve: Curve) -> Plot:
    ends = [
        f"{line.name}: up to {number(last.workload_speedup or 1.0, '.2f')}× at {number(last.perplexity_ratio, '.3f')}"
        for line in curve.frontier
        if line.points and (last := max(line.points, key=lambda p: p.k))
    ]
    known = [p for line in curve.frontier for p in line.points]
    return Plot(
        "frontier",
        f"Perplexity ratio against the speedup of the workload: {'; '.join(ends)}.",
        _sentences(
            "A point is one block more. To the right is faster, below is better.",
            _WHISKERS if any(finite(p.perplexity_ratio_se) for p in known) else "",
            "Filled: what was chosen." if any(p.k == curve.chosen for p in curve.points) else "",
            _DASHED if bounds_of(curve) else "",
        ),
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
    up_to = "the 99th percentile" if speed.has_percentiles else "the upper one"
    found = speed.speedups()
    each = ", ".join(f"{cell.name} {number(over.value, '.2f')}×" for cell, _, over in found)
    others = {r.name for cell in speed.cells for r in cell.results if LINEARIZED in r.name} - {
        speed.linearized
    }
    return Plot(
        race,
        f"Times of everything run on {speed.machine.device}. Linearized over base: {each or 'nowhere timed'}.",
        _sentences(
            f"Milliseconds: medians, whiskers from the lower quartile to {up_to}. Times as fast as the base: higher is "
            "faster.",
            "Whiskers there: 95 % intervals."
            if any(finite(over.least) is not None for _, _, over in found)
            else "",
            "Hollow: not resolved from noise." if any(not over.resolved for _, _, over in found) else "",
            "Dash: the ceiling, which counts multiplications and bytes only."
            if any(result.ceiling is not None for _, result, _ in found)
            else "",
            "Blue: linearized; orange: others that are." if others else "",
        ),
        partial(draw_speed, speed),
    )
