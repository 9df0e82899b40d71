"""Draw the plots of a report with matplotlib: the K curve, the scores of layers, the times of a race.

They show the report's numbers and nothing else: one that is missing, nan or infinite leaves a gap. A :class:`Plot` is
cheap to make; matplotlib is imported when one is drawn. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nbl_export.blocks import Block, Mlp, Span, layer_of
from nbl_export.files import printable
from nbl_export.linearize.selection import Candidate, Curve
from nbl_export.report.drawing import finite, listed, number
from nbl_export.report.schema import Report
from nbl_export.report.selection import Score, bounds_of, scored_by, speedups_of
from nbl_export.report.tables import BENCH, ENGINES, VERIFIED
from nbl_export.verify.speed.values import Speed
from nbl_export.workspace import LINEARIZED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The plots of a verification; what is not drawn any more is removed by its name. That of a bench is the bench's own.
PLOTS = ("k-curve", "layers", VERIFIED, ENGINES)
# Blue, orange and grey differ to every kind of colour vision, and in lightness; series differ in shape too.
_BLUE, _ORANGE, _GREY, _INK = "#0069a8", "#c2500c", "#84909d", "#1c2128"
_MARKERS = "os^vDPX*<>ph"
_DECADES = 100  # figures that span this factor are drawn on a logarithmic axis
_MOST_LAYERS = 1000  # of a plot that can be read; the table has any number
_WHOLE_NUMBERS: dict[str, Any] = {
    "nbins": 20,
    "integer": True,
    "min_n_ticks": 1,
    "steps": [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10],
}
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "font.size": 8.5,
    "grid.color": "#e2e6ea",
    "legend.frameon": False,
    "lines.markersize": 5.5,
    "svg.hashsalt": "nbl-export",
    "text.parse_math": False,  # a name with dollar signs is a name
}


@dataclass(frozen=True)
class Plot:
    """One plot: its file's name, what it shows in words, and what draws it."""

    name: str
    text: str
    draw: Callable[[], Figure]

    def file(self, kind: str) -> bytes:
        """The figure on white, as ``png`` or ``svg``."""
        # It announces the building of its font cache, once on each machine.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        from matplotlib import style

        buffer = io.BytesIO()
        nothing: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
        with (
            warnings.catch_warnings(action="ignore"),
            style.context(["default", _STYLE]),
        ):  # no letter that its font lacks
            self.draw().savefig(buffer, format=kind, dpi=160, metadata=nothing[kind])
        return buffer.getvalue()


def report_plots(report: Report) -> dict[str, Plot]:
    """The plots that there are figures for, by name."""
    plots, selection = [], report.selection
    curve, score = selection.curve, scored_by(selection.criterion, selection.candidates)
    scored = [c for c in selection.candidates if finite(getattr(c, score.field)) is not None]
    if curve and curve.points:
        plots.append(_curve_plot(curve))
    if 0 < len(scored) <= _MOST_LAYERS:
        replaced = listed(selection.layers) or "none"
        text = f"{score.name} of {len(scored)} layers, lower is better; replaced: {replaced}."
        plots.append(Plot("layers", text, partial(_draw_layers, score, scored, set(selection.layers))))
    bench = report.bench.speed if report.bench else None
    races = {VERIFIED: report.speed, ENGINES: report.engine_speed, BENCH: bench}
    plots += [speed_plot(race, speed) for race, speed in races.items() if speed and speed.cells]
    return {plot.name: plot for plot in plots}


def _panels(count: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 2.9 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count // rows, squeeze=False).flat)


def _draw(panel: Axes, points: Sequence[tuple[float, Any, Any, Any]], **look: Any) -> None:
    """Points of x, y and the ends of their whiskers; a point or an end that is no number is left out."""
    x, y, low, high = ([_drawable(one) for one in column] for column in zip(*points, strict=True))
    whiskers = [[max(0.0, b - a) for a, b in zip(*ends, strict=True)] for ends in ((low, y), (y, high))]
    panel.errorbar(x, y, yerr=whiskers, **look)


def _drawable(value: Any) -> float:
    """What matplotlib leaves out where there is no number."""
    return math.nan if (known := finite(value)) is None else known


def _log_if_wide(panel: Axes, values: Sequence[Any]) -> bool:
    """A logarithmic axis where positive ``values`` span decades."""
    known = [v for v in map(finite, values) if v is not None]
    wide = min(known, default=0) > 0 and max(known) >= _DECADES * min(known)
    if wide:
        panel.set_yscale("log", nonpositive="clip")
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.yaxis.set_minor_formatter("")
    return wide


def _curve_plot(curve: Curve) -> Plot:
    points, gains = curve.by_k, speedups_of(curve)
    text = (
        f"Perplexity ratio, KL{' and speedup' if gains else ''} for {len(points)} values of K, {points[0].k} to "
        f"{points[-1].k}; whiskers: standard errors over documents; dashed: the budget."
    )
    for p in (p for p in points if p.k == curve.chosen):
        found = ((name, finite(getattr(p, of))) for name, of in gains.items())
        fast = "".join(f", {name} {gain:.2f}×" for name, gain in found if gain is not None)
        loss = f"perplexity ratio {number(p.perplexity_ratio, '.3f')}, KL {number(p.kl, '.3f')}"
        text += f" Chosen: K = {p.k}, {loss}{fast}."
    return Plot("k-curve", text, partial(_draw_curve, curve))


def _draw_curve(curve: Curve) -> Figure:
    """Perplexity ratio, KL and speedup against K: standard errors, the budget, and the chosen K."""
    points, gains = curve.by_k, speedups_of(curve)
    figure, axes = _panels(3 if gains else 2)
    panels: list[tuple[str, str, dict[str, str | None]]] = [
        ("Perplexity ratio", "perplexity_ratio", {"perplexity_ratio": None}),
        ("KL to the original, nats per token", "kl", {"kl": None}),
        ("Times as fast as the original", "speedup", {of: name for name, of in gains.items()}),
    ]
    for panel, (title, bounded, series) in zip(axes, panels, strict=False):
        panel.set(title=title, xlabel="K, layers replaced")
        panel.locator_params("x", **_WHOLE_NUMBERS)
        for of, color, marker in zip(series, (_BLUE, _ORANGE, _GREY, _INK), _MARKERS, strict=False):
            values = [(p.k, getattr(p, of), finite(getattr(p, f"{of}_se", None)) or 0.0) for p in points]
            ends = [(k, y, _drawable(y) - se, _drawable(y) + se) for k, y, se in values]
            _draw(panel, ends, color=color, marker=marker, label=series[of])
        _log_if_wide(panel, [getattr(p, of) for p in points for of in series])
        for said, limit in (
            (said, limit) for name, said, limit in bounds_of(curve.budget) if name == bounded
        ):
            panel.axhline(limit, color=_INK, linewidth=1.1, linestyle="--", label=said)
        if curve.chosen is not None:
            said = f"K = {curve.chosen}"
            panel.axvline(curve.chosen, color=_GREY, linewidth=0.8, linestyle=":", label=said)
        if panel.get_legend_handles_labels()[1]:
            panel.legend()
    return figure


def _draw_layers(score: Score, scored: Sequence[Candidate], chosen: set[Block]) -> Figure:
    """Each layer's score by the criterion, chosen layers in colour; points instead of bars on a log axis."""
    figure, (panel,) = _panels(1)
    dots = _log_if_wide(panel, [getattr(c, score.field) for c in scored])
    width = 0.36 if any(isinstance(c.layer, Mlp) for c in scored) else 0.72
    for name, color, marker, replaced in (("replaced", _BLUE, "o", True), ("kept", _GREY, "D", False)):
        group = [c for c in scored if (c.layer in chosen) is replaced]
        x, y = [_place(c.layer) for c in group], [_drawable(getattr(c, score.field)) for c in group]
        errors = [finite(getattr(c, f"{score.field}_se", None)) or 0.0 for c in group]
        if dots:
            panel.errorbar(x, y, yerr=errors, fmt=marker, color=color, label=name)
        else:
            panel.bar(x, y, width=width, color=color, yerr=errors if any(errors) else None, label=name)
    panel.set(xlabel="layer", ylabel=score.name)
    panel.locator_params("x", **_WHOLE_NUMBERS)
    panel.legend()
    return figure


def _place(block: Block) -> float:
    """Where a layer's attention stands on the axis of layers, and its MLP, beside it; a span is over its middle."""
    end = block.last + 0.5 if isinstance(block, Span) else layer_of(block) + isinstance(block, Mlp)
    return (layer_of(block) + end) / 2


def speed_plot(race: str, speed: Speed) -> Plot:
    """What a race gave, by cell; ``race`` is its name (:mod:`nbl_export.report.tables`)."""
    up_to = "the 99th percentile" if speed.has_percentiles else "the upper one"
    each = ", ".join(f"{cell.name} {number(over.value, '.2f')}×" for cell, _, over in speed.speedups())
    text = (
        f"Times of everything run on {speed.machine.device}: medians, whiskers from the lower quartile to {up_to}. "
        f"Linearized over base: {each or 'nowhere timed'}; whiskers: 95 % intervals; hollow: not resolved from noise; "
        "dash: the ceiling, which counts multiplications and bytes only."
    )
    return Plot(race, text, partial(_draw_speed, speed))


def _draw_speed(speed: Speed) -> Figure:
    """Milliseconds of everybody by cell, a panel for each phase; then how many times as fast as the base.

    The linearized one over its base has its 95 % interval, is hollow where not resolved, and has its ceiling.
    """
    phases, base = speed.phases, speed.base or LINEARIZED
    # One phase: both panels beside each other.
    figure, axes = _panels(2 * len(phases), rows=min(2, len(phases)))
    timed = [c.name for c in speed.candidates if any(cell.of(c.name) for cell in speed.cells)]
    for above, below, phase in zip(axes, axes[len(phases) :], phases, strict=False):
        cells = [c for c in speed.cells if c.phase == phase]
        above.set_title(f"{phase.capitalize()}, ms" + " per token" * (phase == "decode"))
        below.set_title(f"{phase.capitalize()}, times as fast as the {printable(base)}")
        below.axhline(1, color=_GREY, linewidth=0.8)
        for place, name in enumerate(timed):
            color = _BLUE if name == speed.linearized else _ORANGE if LINEARIZED in name else _GREY
            look: dict[str, Any] = {
                "color": color,
                "marker": _MARKERS[place % len(_MARKERS)],
                "linestyle": "none",
            }
            shift = min(0.2, 0.76 / len(timed)) * (place - (len(timed) - 1) / 2)
            known = [(x + shift, cell.of(base), r) for x, cell in enumerate(cells) if (r := cell.of(name))]
            times = [(x, r.timing) for x, _, r in known]
            ends = [(x, t.median_ms, t.low_ms, t.high_ms if t.p99_ms is None else t.p99_ms) for x, t in times]
            _draw(above, ends, label=printable(name), **look)
            for x, reference, r in known:
                if name == speed.linearized and (over := r.over_base):
                    face = color if over.resolved else "white"
                    _draw(below, [(x, over.value, over.least, over.most)], markerfacecolor=face, **look)
                    below.plot(x, _drawable(r.ceiling), "_", color=_INK, markersize=15)
                elif reference and r is not reference:
                    below.plot(x, _drawable(reference.timing.median_ms / r.timing.median_ms), **look)
        if not _log_if_wide(above, [r.timing.median_ms for cell in cells for r in cell.results]):
            above.set_ylim(bottom=0)
        for panel in (above, below):
            label = "rows × tokens" if any(c.batch > 1 for c in cells) else "tokens"
            panel.set(xlabel=label, xlim=(-0.6, len(cells) - 0.4))
            panel.set_xticks(range(len(cells)), [c.size for c in cells])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))
    return figure
