"""The figures themselves, drawn with matplotlib from sections of a report.

They show the report's numbers and nothing else: one that is missing, nan or infinite leaves a gap. Each is
drawn for a page or, with ``narrow``, for a phone, its panels below each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.selection import Curve
from nbl_export.report.canvas import BASE, DECODE, INK, LINEAR, MUTED, PAPER, drawable, legend, panels
from nbl_export.report.drawing import finite
from nbl_export.report.schema import Selection
from nbl_export.report.selection import BUDGETS, scored_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 100  # figures that span this factor are drawn on a logarithmic axis
_PHASES = {"prefill": (LINEAR, "o"), "encode": (LINEAR, "o"), "decode": (DECODE, "s")}
# Marker and line of a runtime on the GPU, by the first word of its name; an engine has its own.
_RUNTIMES = {"onnxruntime": ("s", "--"), "PyTorch": ("^", ":")}


# the K curve -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Series:
    """A line of the K curve: its figure and standard error, how it is drawn, and which K is marked, by name or not."""

    of: Callable[[CurvePoint], float | None]
    se: Callable[[CurvePoint], float | None] = lambda _: None
    colour: str = LINEAR
    marker: str = "o"
    named: bool = False


_RATIO = _Series(lambda p: p.perplexity_ratio, lambda p: p.perplexity_ratio_se, named=True)
_KL = _Series(lambda p: p.kl, lambda p: p.kl_se, named=True)
_SPEEDUPS = {
    "prefill": _Series(
        lambda p: p.prefill_speedup, colour=_PHASES["prefill"][0], marker=_PHASES["prefill"][1]
    ),
    "decode": _Series(lambda p: p.decode_speedup, colour=_PHASES["decode"][0], marker=_PHASES["decode"][1]),
}


def draw_curve(curve: Curve, narrow: bool = False) -> Figure:
    """Perplexity ratio, KL and speedup against K: standard errors, the budget, and the chosen K."""
    points = curve.by_k
    phases = {name: s for name, s in _SPEEDUPS.items() if any(finite(s.of(p)) for p in points)}
    figure, axes = panels(3 if phases else 2, narrow)
    shown = {"perplexity_ratio": axes[0], "kl": axes[1]}
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
    for bound in BUDGETS:
        limit = finite(bound.of(curve.budget))
        if limit is not None and bound.figure in shown:
            _budget(shown[bound.figure], limit, "at least" if bound.figure == "speedup" else "at most")
    for panel in axes:
        _k_axis(panel, [p.k for p in points])
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
    panel.axhline(bound, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    # Both figures grow with K: what must stay below the line leaves room above it on the left, and the other way round.
    least = word == "at least"
    panel.annotate(
        f"budget: {word} {bound:g}",
        (1 if least else 0, bound),
        (-2, -3) if least else (2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right" if least else "left",
        va="top" if least else "bottom",
    )
    panel.margins(y=0.12)


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
        panel.yaxis.set_major_formatter("{x:g}")  # 0.001: powers would be formulas, which stay off
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
    entries: dict[str, Any] = {}
    for name, colour, marker, group in (
        ("replaced", LINEAR, "o", [c for c in scored if c.layer in chosen]),
        ("kept", BASE, "D", [c for c in scored if c.layer not in chosen]),
    ):
        if not group:
            continue
        x, y = [c.layer for c in group], [drawable(score.of(c)) for c in group]
        errors = [finite(score.se(c)) or 0.0 for c in group]
        bars: dict[str, Any] = {"yerr": errors, "ecolor": INK} if any(errors) else {}
        if dots:
            entries[name] = panel.errorbar(x, y, linestyle="none", marker=marker, color=colour, **bars)
        else:
            bars |= {"error_kw": {"elinewidth": 1.0}} if bars else {}
            entries[name] = panel.bar(x, y, width=0.72, color=colour, **bars)
    panel.set_xlabel("layer")
    panel.set_ylabel(score.name)
    panel.xaxis.set_major_locator(MaxNLocator(8 if narrow else 20, integer=True, min_n_ticks=1))
    panel.margins(x=0.02)
    legend(figure, entries)
    return figure


# speed -------------------------------------------------------------------------------------------


def draw_speed(speed: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Base against linearized by context, a panel for each phase; then the speedup beside its ceiling."""
    cells = speed["cells"]
    phases = list(dict.fromkeys(c["phase"] for c in cells))
    figure, axes = panels(len(phases) + 1, narrow)
    entries: dict[str, Any] = {}
    for panel, phase in zip(axes, phases, strict=False):
        group = [c for c in cells if c["phase"] == phase]
        for side, colour, shift in (("base", BASE, -0.2), ("linearized", LINEAR, 0.2)):
            entries.setdefault(side, _timings(panel, [c[side] for c in group], colour, shift))
        panel.set_title(f"{phase.capitalize()}, ms" + " per token" * (phase == "decode"))
        _contexts(panel, [c["context"] for c in group])
    last = axes[-1]
    last.set_title("Speedup")
    _times_axis(last)
    last.axhline(1, color=MUTED, linewidth=0.8)
    contexts = sorted({c["context"] for c in cells})
    ceiling: dict[str, Any] = {}
    for index, phase in enumerate(phases):
        colour, marker = _PHASES.get(phase, (LINEAR, "o"))
        shift = 0.24 * (index - (len(phases) - 1) / 2)
        for cell in (c for c in cells if c["phase"] == phase):
            drawn = _speedup(last, cell, contexts.index(cell["context"]) + shift, colour, marker)
            if cell["resolved"] or f"{phase} speedup" not in entries:
                entries[f"{phase} speedup"] = drawn
            tick = last.plot(
                contexts.index(cell["context"]) + shift,
                drawable(cell["ceiling"]),
                color=INK,
                marker="_",
                markersize=15,
                markeredgewidth=1.8,
                linestyle="none",
            )
            ceiling = {"ceiling": tick[0]}
    _contexts(last, contexts)
    entries |= ceiling
    legend(figure, entries)
    return figure


def _timings(panel: Axes, timings: Sequence[Mapping[str, Any]], colour: str, shift: float) -> Any:
    """Bars of the medians, whiskers to the quartiles."""
    middle = [drawable(t["median_ms"]) for t in timings]
    low = [max(0.0, m - drawable(t["low_ms"])) for m, t in zip(middle, timings, strict=True)]
    high = [max(0.0, drawable(t["high_ms"]) - m) for m, t in zip(middle, timings, strict=True)]
    x = [i + shift for i in range(len(timings))]
    panel.margins(y=0.1)
    return panel.bar(
        x,
        middle,
        width=0.36,
        color=colour,
        yerr=[low, high],
        ecolor=INK,
        error_kw={"elinewidth": 1.1, "capsize": 2.5},
    )


def _speedup(panel: Axes, cell: Mapping[str, Any], x: float, colour: str, marker: str) -> Any:
    """The median with its quartiles; hollow where the noise exceeds the effect."""
    middle = drawable(cell["speedup"])
    spread = [
        [max(0.0, middle - drawable(cell["speedup_low"]))],
        [max(0.0, drawable(cell["speedup_high"]) - middle)],
    ]
    return panel.errorbar(
        [x],
        [middle],
        yerr=spread,
        color=colour,
        marker=marker,
        markersize=6.5,
        markerfacecolor=colour if cell["resolved"] else PAPER,
        linestyle="none",
    )


def _contexts(panel: Axes, contexts: Sequence[int]) -> None:
    panel.set_xlabel("tokens")
    panel.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts])
    panel.set_xlim(-0.6, len(contexts) - 0.4)


# bench -------------------------------------------------------------------------------------------

_MARKERS = ("s", "^", "v", "D", "P", "X", "*", "<", ">", "p", "h")


def draw_bench(
    cells: Sequence[Mapping[str, Any]], competitors: Sequence[Mapping[str, Any]], narrow: bool = False
) -> Figure:
    """How many times as fast as the base graph everybody is, by batch and context, a panel for each phase."""
    phases = list(dict.fromkeys(c["phase"] for c in cells))
    names = list(dict.fromkeys(lap["name"] for c in cells for lap in c["laps"]))
    rivals = [name for name in names if name not in ("base", "linearized")]
    # Another exporter's linearized graph has the shape of its own base graph, in a colour of its own.
    own_base = {c["name"]: c["base"] for c in competitors if c["base"] in rivals}
    pairs = dict.fromkeys(own_base.get(name, name) for name in rivals)
    shapes = dict(zip(pairs, cycle(_MARKERS), strict=False))
    figure, axes = panels(max(1, len(phases)), narrow)
    entries: dict[str, Any] = {}
    for panel, phase in zip(axes, phases, strict=False):
        group = [c for c in cells if c["phase"] == phase]
        panel.set_title(f"{phase.capitalize()}, times as fast as the base graph")
        _times_axis(panel)
        panel.axhline(1, color=MUTED, linewidth=0.8)
        for x, cell in enumerate(group):
            laps = {lap["name"]: lap for lap in cell["laps"]}
            if (own := laps.get("linearized")) and own["over_base"]:
                found = own["over_base"]
                at = {"speedup": found["value"], "speedup_low": found["least"], "speedup_high": found["most"]}
                drawn = _speedup(panel, at | {"resolved": found["resolved"]}, x, LINEAR, "o")
                entries.setdefault("linearized", drawn)
                limit = drawable(own["ceiling"])
                tick = panel.plot(x, limit, color=INK, marker="_", markersize=15, markeredgewidth=1.8)
                entries.setdefault("its ceiling", tick[0])
            for i, name in enumerate(rivals):
                if name in laps and "base" in laps:
                    times = laps["base"]["timing"]["median_ms"] / laps[name]["timing"]["median_ms"]
                    place = i - (len(rivals) - 1) / 2  # to both sides of the linearized graph in the middle
                    point = panel.plot(
                        x + 0.06 * math.copysign(1, place) + 0.68 * place / max(1, len(rivals)),
                        drawable(times),
                        color=DECODE if "linearized" in name else BASE,
                        marker=shapes[own_base.get(name, name)],
                        linestyle="none",
                    )
                    entries.setdefault(name, point[0])
        ticks = [f"{c['batch']} × {c['context']:,}" if c["batch"] > 1 else f"{c['context']:,}" for c in group]
        panel.set_xticks(range(len(group)), ticks)
        panel.set_xlim(-0.6, len(group) - 0.4)
        panel.set_xlabel("rows × tokens")
    legend(figure, entries)
    return figure


# engines -----------------------------------------------------------------------------------------


def draw_engines(speed: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Medians of everything timed on the GPU by context, whiskers up to the 99th percentile."""
    figure, axes = panels(2, narrow)
    latencies = speed["latencies"]
    contexts = sorted({x["context"] for x in latencies})
    names = list(dict.fromkeys(x["name"] for x in latencies))
    entries: dict[str, Any] = {}
    for panel, phase in zip(axes, ("prefill", "decode"), strict=True):
        for index, name in enumerate(names):
            group = [x for x in latencies if x["name"] == name]
            middle = [drawable(x[f"{phase}_ms"]) for x in group]
            above = [max(0.0, drawable(x[f"{phase}_p99_ms"]) - m) for x, m in zip(group, middle, strict=True)]
            shift = 0.09 * (index - (len(names) - 1) / 2)
            marker, line = _RUNTIMES.get(name.split()[0], ("o", "-"))
            entries[name] = panel.errorbar(
                [contexts.index(x["context"]) + shift for x in group],
                middle,
                yerr=[[0.0] * len(above), above],
                color=LINEAR if "linearized" in name else BASE,
                marker=marker,
                linestyle=line,
                elinewidth=1.0,
            )
        panel.set_title(f"{phase.capitalize()}, ms" + " per token" * (phase == "decode"))
        panel.set_ylim(bottom=0)
        _contexts(panel, contexts)
    legend(figure, entries)
    return figure
