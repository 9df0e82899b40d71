"""Verdicts on measured speedups: whether they can be believed, and whether anything got slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Literal

from nbl_export.checks import Check
from nbl_export.verify.speed.values import Speed

# The base graph in a second session.
CONTROL = "base again"
# Of the speedup measured, what may be the luck of a session: where it lies in memory.
_UNLIKE = 0.5


def speed_check(speed: Speed) -> Check:
    """Whether the figures can be believed. A doubt is no verdict on the graph, and leaves the check open.

    It says how much of them is more than noise, and what is slower, which is no doubt.
    """
    check, found = _ceilings_check("speed", speed, "skipped"), speed.speedups()
    if not found:
        return Check("speed", "skipped", "nothing was timed beside its base")
    slower = [f"{cell.name} {over.value:.2f}×" for cell, _, over in found if over.resolved and over.value < 1]
    said = [
        f"{sum(over.resolved for _, _, over in found)} of {len(found)} speedups are resolved",
        *([f"slower: {', '.join(slower)}"] if slower else []),
    ]
    return replace(check, detail="; ".join([check.detail, *said]))


def bench_checks(speed: Speed) -> Sequence[Check]:
    """Whether the figures can be believed, a doubt failing, and whether anything got slower."""
    slower, resolved = [], []
    for cell in speed.cells:
        for result in cell.results:
            if over := result.over_base:
                resolved.append(over.resolved)
                if over.resolved and over.value < 1:
                    slower.append(f"{cell.name}, {result.name}: {over.value:.2f}×")
    return (
        _ceilings_check("ceilings", speed, "failed"),
        Check(
            "nowhere slower",
            "failed" if slower else "passed" if any(resolved) else "skipped",
            "; ".join(slower)
            or f"{sum(resolved)} of {len(resolved)} comparisons with their base are resolved",
        ),
        _control_check(speed),
    )


def _ceilings_check(name: str, speed: Speed, doubt: Literal["failed", "skipped"]) -> Check:
    """Whether every speedup above its ceiling has its reason; ``doubt`` is the status of one with a suspect cell."""
    suspect = [
        f"{cell.name}, {result.name}: {e.saved_ms:.2f} ms saved at least, {e.excess_ms:.2f} of them beyond the "
        f"ceiling, but {e.gone_ms:.2f} in nodes that are gone"
        for cell, result, e in speed.explained()
        if e.suspect
    ]
    return Check(name, doubt if suspect else "passed", "; ".join(suspect) or _above(speed))


def _above(speed: Speed) -> str:
    """How many speedups are certainly above their ceilings, where none of them is suspect."""
    every = [r.above for cell in speed.cells for r in cell.results if r.over_base and r.ceiling is not None]
    reasons = {
        "explained by nodes that are gone": every.count("explained"),
        "not profiled": every.count("not profiled"),
    }
    said = [
        f"{count} of {len(every)} speedups above the ceiling, {why}"
        for why, count in reasons.items()
        if count
    ]
    return "; ".join(said) or "no speedup is certainly above its ceiling"


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
