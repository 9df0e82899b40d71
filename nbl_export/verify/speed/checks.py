"""Verdicts on measured speedups: whether they can be believed, and whether anything got slower."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from nbl_export.records import Check
from nbl_export.verify.speed.values import Speed

# The base graph in a second session.
CONTROL = "base again"
# Of the speedup measured, what may be the luck of a session: where it lies in memory.
_UNLIKE = 0.5


def speed_check(speed: Speed) -> Check:
    """How much of the speedups is more than noise, what is slower, and what is above its ceiling."""
    found = speed.speedups()
    if not found:
        return Check("speed", "skipped", "nothing was timed beside its base")
    slower = [f"{cell.name} {over.value:.2f}×" for cell, _, over in found if over.resolved and over.value < 1]
    said = [
        _above(speed),
        f"{sum(over.resolved for _, _, over in found)} of {len(found)} speedups are resolved",
        *([f"slower: {', '.join(slower)}"] if slower else []),
    ]
    return Check("speed", "passed", "; ".join(said))


def bench_checks(speed: Speed) -> Sequence[Check]:
    """Whether anything got slower, and the base graph is as fast in a second session."""
    slower, resolved = [], []
    for cell in speed.cells:
        for result in cell.results:
            if over := result.over_base:
                resolved.append(over.resolved)
                if over.resolved and over.value < 1:
                    slower.append(f"{cell.name}, {result.name}: {over.value:.2f}×")
    return (
        Check("ceilings", "passed", _above(speed)),
        Check(
            "nowhere slower",
            "failed" if slower else "passed" if any(resolved) else "skipped",
            "; ".join(slower)
            or f"{sum(resolved)} of {len(resolved)} comparisons with their base are resolved",
        ),
        _control_check(speed),
    )


def _above(speed: Speed) -> str:
    """How many speedups are certainly above their ceilings, which count products and bytes alone."""
    every = [r.above_ceiling for cell in speed.cells for r in cell.results if r.over_base and r.ceiling]
    if not (count := every.count(True)):
        return "no speedup is certainly above its ceiling"
    return f"{count} of {len(every)} speedups above the ceiling, which counts multiplications and bytes alone"


def _control_check(speed: Speed) -> Check:
    """Whether the base graph, in the race twice, is as fast both times, as far as the effect measured goes."""
    unlike, compared = [], 0
    for cell in speed.cells:
        both = [result.linearized_over for name in (speed.base, CONTROL) if (result := cell.of(str(name)))]
        if len(both) < 2 or not (both[0] and both[1]):
            continue
        first, again = both[0], both[1]
        if not (isfinite(first.most) and isfinite(again.most)):
            continue  # of too few rounds nothing is known
        compared += 1
        apart = first.least > again.most or again.least > first.most
        if apart and abs(first.value - again.value) > _UNLIKE * abs(first.value - 1):
            unlike.append(
                f"{cell.name}: linearized is {first.value:.2f}× as fast as the base graph, "
                f"{again.value:.2f}× as fast as the same graph in another session"
            )
    return Check(
        "same graph twice",
        "failed" if unlike else "passed" if compared else "skipped",
        "; ".join(unlike) or f"the base graph is as fast in a second session, in {compared} cells",
    )
