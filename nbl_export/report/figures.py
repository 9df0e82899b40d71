"""The figures themselves, drawn with matplotlib from sections of a report.

They show the report's numbers and nothing else: one that is missing, nan or infinite leaves a gap. Each is
drawn for a page or, with ``narrow``, for a phone, its panels below each other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import LINEARIZED
from nbl_export.blocks import Block, Mlp, Span, layer_of
from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.selection import Curve
from nbl_export.report.canvas import BASE, DECODE, INK, LINEAR, MUTED, PAPER, drawable, legend, level, panels
from nbl_export.report.drawing import finite
from nbl_export.report.schema import Selection
from nbl_export.report.selection import BUDGETS, BY_BLOCKS, scored_by
from nbl_export.verify.speed.values import CellResult, Ratio, Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 100  # figures that span this factor are drawn on a logarithmic axis
_PHASES = {"prefill": (LINEAR, "o"), "decode": (DECODE, "s")}


# the K curve -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Series:
    """A line of the K curve: its figure and standard error, how it is drawn, and which K is marked, by name or not."""

    of: Callable[[CurvePoint], float | None]
    se: Callable[[CurvePoint], float | None] = lambda _: None
    colour: str = LINEAR
    marker: str = "o"
    named: bool = False


_RATIO_FIGURE = "perplexity_ratio"
_RATIO = _Series(lambda p: p.perplexity_ratio, lambda p: p.perplexity_ratio_se, named=True)
_KL = _Series(lambda p: p.kl, lambda p: p.kl_se, named=True)
_SPEEDUPS = {
    "prefill": _Series(
        lambda p: p.prefill_speedup, colour=_PHASES["prefill"][0], marker=_PHASES["prefill"][1]
    ),
    "decode": _Series(lambda p: p.decode_speedup, colour=_PHASES["decode"][0], marker=_PHASES["decode"][1]),
    BY_BLOCKS: _Series(lambda p: p.workload_speedup, colour=MUTED, marker="^"),
    "workload, timed": _Series(lambda p: p.timed_speedup, colour=LINEAR, marker="D"),
}
# Each way of a frontier: what it is called, its colour and its marker.
_WAYS = {
    "both": ("attention and MLPs", LINEAR, "o"),
    "attention": ("attention alone", DECODE, "s"),
    "MLPs": ("MLPs alone", INK, "^"),
    "spans": ("spans of layers alone", MUTED, "v"),
    "all": ("attention, MLPs and spans", LINEAR, "o"),
    "dropped": ("dropped", BASE, "x"),
}


def speedups_of(points: Sequence[CurvePoint]) -> dict[str, _Series]:
    """The speedups that were measured at any of the points, by what they are of."""
    return {name: s for name, s in _SPEEDUPS.items() if any(finite(s.of(p)) for p in points)}


def bounds_of(curve: Curve, shown: Container[str] = (_RATIO_FIGURE,)) -> list[tuple[str, float]]:
    """Those of the figures ``shown`` that the budget has a bound for, which is drawn: by default of a frontier."""
    limits = [(bound.figure, finite(bound.of(curve.budget))) for bound in BUDGETS]
    return [(name, limit) for name, limit in limits if limit is not None and name in shown]


def draw_curve(curve: Curve, narrow: bool = False) -> Figure:
    """Perplexity ratio, KL and speedup against K: standard errors, the budget, and the chosen K."""
    points = curve.by_k
    phases = speedups_of(points)
    figure, axes = panels(3 if phases else 2, narrow)
    shown = {_RATIO_FIGURE: axes[0], "kl": axes[1]}
    axes[0].set_title("Perplexity ratio")
    axes[1].set_title("KL to the original, nats per token")
    for panel, series in zip(axes, (_RATIO, _KL), strict=False):
        _draw_series(panel, points, series, curve.chosen)
    _log_if_wide(axes[1], [finite(p.kl) for p in points])
    if phases:
        shown["speedup"] = axes[2]
        axes[2].set_title("Speedup" + (f" at {curve.context:,} tokens" if curve.context else ""))
        lines = {name: _draw_series(axes[2], points, series, curve.chosen) for name, series in phases.items()}
        _times_axis(axes[2])
        axes[2].legend(list(lines.values()), list(lines), loc="best")
    for panel in axes:
        _k_axis(panel, [p.k for p in points])
    for name, limit in bounds_of(curve, shown):
        _budget(shown[name], limit, "at least" if name == "speedup" else "at most")
    return figure


def draw_frontier(curve: Curve, narrow: bool = False) -> Figure:
    """Perplexity ratio against the speedup of the workload, a line for each way; the chosen point filled."""
    figure, (panel,) = panels(1, narrow)
    panel.set_title("Perplexity ratio by speedup of the workload")
    entries: dict[str, Any] = {}
    for number, line in enumerate(curve.frontier):
        name, colour, marker = _WAYS.get(line.name, (line.name, MUTED, "v"))
        points = [p for p in line.points if finite(p.workload_speedup) is not None]
        entries[name] = panel.errorbar(
            [drawable(p.workload_speedup) for p in points],
            [drawable(p.perplexity_ratio) for p in points],
            yerr=[finite(p.perplexity_ratio_se) or 0.0 for p in points],
            color=colour,
            marker=marker,
            markerfacecolor=PAPER,
            markeredgewidth=1.4,
            elinewidth=1.0,
            zorder=2 if number else 3,
        )
        for p in points:
            if not number and p.k == curve.chosen:
                here = drawable(p.workload_speedup), drawable(p.perplexity_ratio)
                panel.plot(*here, color=colour, marker=marker, markersize=8, zorder=4, linestyle="none")
                panel.annotate(f"K = {p.k}", here, (7, -4), textcoords="offset points", va="top", color=MUTED)
    _log_if_wide(panel, [finite(p.perplexity_ratio) for line in curve.frontier for p in line.points])
    for _, limit in bounds_of(curve):
        _budget(panel, limit, "at most")
    panel.xaxis.set_major_formatter("{x:.2f}×")
    panel.set_xlabel("times as fast as the original")
    panel.margins(x=0.06)
    legend(figure, entries)
    return figure


def _draw_series(panel: Axes, points: Sequence[CurvePoint], series: _Series, chosen: int | None) -> Any:
    """A line with error bars through the points that have the figure; the chosen one filled, the others hollow."""
    known = [p for p in points if finite(series.of(p)) is not None]
    k, y = [p.k for p in known], [drawable(series.of(p)) for p in known]
    errors = [finite(series.se(p)) or 0.0 for p in known]
    line = panel.errorbar(
        k,
        y,
        yerr=errors,
        color=series.colour,
        marker=series.marker,
        markerfacecolor=PAPER,
        markeredgewidth=1.4,
        elinewidth=1.2,
    )
    here = [(a, b) for a, b in zip(k, y, strict=True) if a == chosen]
    if here:
        if series.named:
            panel.annotate(
                f"K = {chosen}",
                (here[0][0], 1),
                (4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                color=MUTED,
            )
        panel.axvline(here[0][0], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0.5)
        panel.plot(
            *here[0],
            color=series.colour,
            marker=series.marker,
            markersize=8,
            zorder=4,
            linestyle="none",
        )
    return line


def _budget(panel: Axes, bound: float, word: str) -> None:
    # Both figures grow with K: what must stay below the line leaves room above it on the left, and the other way round.
    least = word == "at least"
    level(panel, bound, f"budget: {word} {bound:g}", (least, least))


def _times_axis(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter("{x:.2f}×")


def _k_axis(panel: Axes, k: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("K, layers replaced")
    if len(k) <= 10:
        panel.set_xticks(sorted(set(k)))
    else:
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.margins(x=0.06)


def _log_if_wide(panel: Axes, values: Sequence[float | None]) -> bool:
    """A logarithmic axis where positive ``values`` span decades."""
    known = [v for v in values if v is not None]
    wide = min(known, default=0) > 0 and max(known) >= _DECADES * min(known)
    if wide:
        panel.set_yscale("log", nonpositive="clip")
        panel.yaxis.set_major_formatter("{x:,g}")  # 0.001: powers would be formulas, which stay off
        panel.yaxis.set_minor_formatter("")
    return wide


# layers ------------------------------------------------------------------------------------------


def draw_layers(selection: Selection, narrow: bool = False) -> Figure:
    """Each layer's score by the criterion, chosen layers in colour; points instead of bars on a log axis."""
    from matplotlib.ticker import MaxNLocator

    score = scored_by(selection.criterion, selection.candidates)
    scored = [c for c in selection.candidates if finite(score.of(c)) is not None]
    chosen = set(selection.layers)
    figure, (panel,) = panels(1, narrow)
    dots = _log_if_wide(panel, [finite(score.of(c)) for c in scored])
    apart = 0.5 if any(isinstance(c.layer, Mlp) for c in scored) else 1.0
    entries: dict[str, Any] = {}
    for name, colour, marker, group in (
        ("replaced", LINEAR, "o", [c for c in scored if c.layer in chosen]),
        ("kept", BASE, "D", [c for c in scored if c.layer not in chosen]),
    ):
        if not group:
            continue
        x, y = [_place(c.layer) for c in group], [drawable(score.of(c)) for c in group]
        errors = [finite(score.se(c)) or 0.0 for c in group]
        bars: dict[str, Any] = {"yerr": errors, "ecolor": INK} if any(errors) else {}
        if dots:
            entries[name] = panel.errorbar(x, y, linestyle="none", marker=marker, color=colour, **bars)
        else:
            bars |= {"error_kw": {"elinewidth": 1.0}} if bars else {}
            entries[name] = panel.bar(x, y, width=0.72 * apart, color=colour, **bars)
    panel.set_xlabel("layer")
    panel.set_ylabel(score.name)
    panel.xaxis.set_major_locator(MaxNLocator(8 if narrow else 20, integer=True, min_n_ticks=1))
    panel.margins(x=0.02)
    legend(figure, entries)
    return figure


def _place(block: Block) -> float:
    """Where a layer's attention stands on the axis of layers, and its MLP, beside it; a span is over its middle."""
    if isinstance(block, Span):
        return (block.layer + block.last) / 2 + 0.25
    return layer_of(block) + 0.5 * isinstance(block, Mlp)


# speed -------------------------------------------------------------------------------------------

_PHONE_LETTERS = 36  # so many stand beside each other below a panel on a phone
_MARKERS = ("s", "^", "v", "D", "P", "X", "*", "<", ">", "p", "h")


@dataclass(frozen=True)
class _Look:
    """How one candidate is drawn: both graphs of a pair have one shape, side by side in their cells."""

    colour: str
    marker: str
    shift: float


def draw_speed(speed: Speed, narrow: bool = False) -> Figure:
    """Milliseconds of everybody by cell, a panel for each phase; then how many times as fast as the base."""
    phases, looks = speed.phases, _looks(speed)
    # One phase: both panels beside each other.
    figure, axes = panels(2 * len(phases), narrow, rows=2 if len(phases) > 1 else 1)
    entries: dict[str, Any] = {}
    for index, phase in enumerate(phases):
        cells = [c for c in speed.cells if c.phase == phase]
        _milliseconds(axes[index], phase, cells, looks, entries)
        _speedups(axes[len(phases) + index], phase, cells, looks, entries, speed)
        for panel in (axes[index], axes[len(phases) + index]):
            panel.set_xlabel("rows × tokens" if any(c.batch > 1 for c in cells) else "tokens")
            sizes = [c.size for c in cells]
            crowded = narrow and sum(map(len, sizes)) > _PHONE_LETTERS
            turned: dict[str, Any] = {"rotation": 35, "ha": "right"} if crowded else {}
            panel.set_xticks(range(len(cells)), sizes, **turned)
            panel.set_xlim(-0.6, len(cells) - 0.4)
    legend(figure, entries)
    return figure


def _looks(speed: Speed) -> dict[str, _Look]:
    """Of each candidate that was timed anywhere."""
    timed = dict.fromkeys(r.name for c in speed.cells for r in c.results)
    names = [c.name for c in speed.candidates if c.name in timed]
    own_base = {c.name: c.base for c in speed.candidates if c.base and c.base != speed.base}
    pairs = dict.fromkeys(own_base.get(n, n) for n in names if n not in (speed.base, speed.linearized))
    shapes = dict(zip(pairs, cycle(_MARKERS), strict=False))
    found = {}
    for index, name in enumerate(names):
        colour = LINEAR if name == speed.linearized else DECODE if LINEARIZED in name else BASE
        shift = min(0.2, 0.76 / len(names)) * (index - (len(names) - 1) / 2)
        found[name] = _Look(colour, shapes.get(own_base.get(name, name), "o"), shift)
    return found


def _milliseconds(
    panel: Axes,
    phase: str,
    cells: Sequence[CellResult],
    looks: Mapping[str, _Look],
    entries: dict[str, Any],
) -> None:
    """Medians with whiskers from the lower quartile to the upper or, where it is known, the 99th percentile."""
    for name, look in looks.items():
        known = [(x, r.timing) for x, cell in enumerate(cells) if (r := cell.of(name))]
        middle = [drawable(t.median_ms) for _, t in known]
        low = [max(0.0, m - drawable(t.low_ms)) for m, (_, t) in zip(middle, known, strict=True)]
        ends = [drawable(t.high_ms if t.p99_ms is None else t.p99_ms) for _, t in known]
        high = [max(0.0, end - m) for m, end in zip(middle, ends, strict=True)]
        drawn = panel.errorbar(
            [x + look.shift for x, _ in known],
            middle,
            yerr=[low, high],
            color=look.colour,
            marker=look.marker,
            elinewidth=1.0,
            linestyle="none",
        )
        entries.setdefault(name, drawn)
    panel.set_title(f"{phase.capitalize()}, ms" + " per token" * (phase == "decode"))
    if not _log_if_wide(panel, [r.timing.median_ms for cell in cells for r in cell.results]):
        panel.set_ylim(bottom=0)


def _speedups(
    panel: Axes,
    phase: str,
    cells: Sequence[CellResult],
    looks: Mapping[str, _Look],
    entries: dict[str, Any],
    speed: Speed,
) -> None:
    """Over the base; the linearized one with its 95 % interval, hollow where it is not resolved, and its ceiling."""
    base = speed.base or LINEARIZED
    panel.set_title(f"{phase.capitalize()}, times as fast as the {base}" + " graph" * (" " not in base))
    _times_axis(panel)
    panel.axhline(1, color=MUTED, linewidth=0.8)
    for x, cell in enumerate(cells):
        reference = cell.of(base)
        for result in cell.results:
            look = looks[result.name]
            place = x + look.shift
            if result.name == speed.linearized and result.over_base:
                _speedup(panel, result.over_base, place, look)
                if result.ceiling is not None:
                    tick = panel.plot(
                        place,
                        drawable(result.ceiling),
                        color=INK,
                        marker="_",
                        markersize=15,
                        markeredgewidth=1.8,
                        linestyle="none",
                    )
                    entries.setdefault("ceiling", tick[0])
            elif reference and result is not reference:
                times = drawable(reference.timing.median_ms / result.timing.median_ms)
                panel.plot(place, times, color=look.colour, marker=look.marker, linestyle="none")


def _speedup(panel: Axes, over: Ratio, x: float, look: _Look) -> None:
    """An interval without bounds, of too few rounds, has no whiskers."""
    middle, ends = drawable(over.value), (finite(over.least), finite(over.most))
    low, high = (0.0 if end is None else abs(end - middle) for end in ends)
    panel.errorbar(
        [x],
        [middle],
        yerr=[[low], [high]],
        color=look.colour,
        marker=look.marker,
        markersize=6.5,
        markerfacecolor=look.colour if over.resolved else PAPER,
        linestyle="none",
    )
