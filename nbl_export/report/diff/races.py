"""Speed on both sides: whether it compares, and how much slower B is by 95 % intervals.

On one machine, a speedup over the same base is the surest comparison, since base and linearized graph were timed in
turns: a day on which the machine is slow changes both. Where the bases differ, times are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nbl_export.report.diff.sides import Opened
from nbl_export.report.diff.values import Unlike
from nbl_export.report.environment import Environment
from nbl_export.verify.speed.values import LEAST_ROUNDS, Ratio, Result, Speed

# Half a 95 % interval that compares two medians, in interquartile ranges over √rounds (McGill, Tukey, Larsen 1978).
_NOTCH = 1.57
SPEED, ENGINE_SPEED, BENCH = "Speed", "Engine speed", "Bench"


@dataclass(frozen=True)
class Race:
    """What one side timed and on what machine; ``base`` is what is known of the graph that speedups are over."""

    speed: Speed
    environment: Environment
    base: Any

    @property
    def machine(self) -> str:
        """All that a time depends on and that is no version of a package."""
        own, device = self.environment, self.speed.machine
        threads = f", {device.threads} threads" if device.threads else ""
        return f"{own.processor}, {own.cores} cores, {own.system}, {device.device}{threads}"


def races_of(side: Opened) -> dict[str, Race]:
    """The races of one side by the titles of their sections."""
    found: dict[str, Race] = {}
    report, bench = side.report, side.bench
    # Names of tensors are part of the file's size, and of nothing that takes time.
    graph = report and (
        replace(report.graph.before, file_bytes=0),
        report.graph.precision,
        report.graph.kv_cache,
    )
    for name, title in (("speed", SPEED), ("engine_speed", ENGINE_SPEED)):
        speed = getattr(report, name, None)
        if report and speed:
            kept = report.kept.get(name)
            found[title] = _race(speed, kept.environment if kept else report.environment, graph)
    if bench:
        found[BENCH] = _race(bench.speed, bench.environment, graph)
    return found


def _race(speed: Speed, environment: Environment, graph: Any) -> Race:
    cost = next((c.cost for c in speed.candidates if c.name == speed.base), None)
    return Race(speed, environment, (graph, cost))


def unlike(a: Race | None, b: Race | None) -> tuple[Unlike | None, tuple[str, ...]]:
    """Why speedups of two races do not compare, and that and what else a reader should know of them."""
    if a is None or b is None:
        return None, ()
    if a.machine != b.machine:
        return "on another machine", (
            f"Times and speedups do not compare: A on {a.machine}; B on {b.machine}.",
        )
    own, other = a.environment.packages, b.environment.packages
    versions = [
        f"{name} {own.get(name, 'none')} → {other.get(name, 'none')}"
        for name in sorted({**own, **other})
        if own.get(name) != other.get(name)
    ]
    notes = (f"Other versions, of which a difference may come: {', '.join(versions)}.",) if versions else ()
    if a.base != b.base:
        why = "The unmodified graphs differ, so that speedups over them do not compare; the times beside them do."
        return "over another base", (why, *notes)
    return None, notes


@dataclass(frozen=True)
class Slowdown:
    """How many times as long B takes in a ``cell``, and its 95 % interval; both are nan where that is not known."""

    cell: str
    value: float
    least: float
    most: float


def slowdowns(a: Race, b: Race) -> Iterator[Slowdown]:
    """Of every cell that both have, by speedups over the same base, or by times."""
    own, other = cells(a.speed), cells(b.speed)
    for name in own:
        if name in other:
            (result, over), (result_b, over_b) = own[name], other[name]
            # A speedup that falls is a time that rises.
            pair = (_of(over), _of(over_b)) if a.base == b.base else (_time(result_b), _time(result))
            yield _ratio(name, *pair)


def cells(speed: Speed) -> dict[str, tuple[Result, Ratio]]:
    """The linearized candidate by cell, wherever it was timed beside its base."""
    return {cell.name: (result, over) for cell, result, over in speed.speedups()}


_Range = tuple[float, float, float]  # a value, the least and the most that it may be


def _of(over: Ratio) -> _Range:
    return over.value, over.least, over.most


def _time(result: Result) -> _Range:
    """The median in milliseconds, and how far two of them may be apart by chance."""
    timing, rounds = result.timing, result.rounds
    half = (
        _NOTCH * (timing.high_ms - timing.low_ms) / math.sqrt(rounds) if rounds >= LEAST_ROUNDS else math.nan
    )
    return timing.median_ms, timing.median_ms - half, timing.median_ms + half


def _ratio(cell: str, one: _Range, other: _Range) -> Slowdown:
    if not all(0 < number < math.inf for number in (*one, *other)):
        return Slowdown(cell, math.nan, math.nan, math.nan)
    return Slowdown(cell, one[0] / other[0], one[1] / other[2], one[2] / other[1])
