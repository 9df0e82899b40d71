"""Hold what B may cost beside A to bounds: perplexity, times and size; and tell whether two sides compare at all.

On one machine, a speedup over the same base is the surest comparison, since base and linearized graph were timed in
turns: a day on which the machine is slow changes both. Where the bases differ, times are compared. What a bound asks
for and cannot be judged has failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from nbl_export.records import Check
from nbl_export.report.diff_facts import BENCH, ENGINE_SPEED, SPEED, Opened
from nbl_export.report.drawing import mebibytes
from nbl_export.report.schema import Environment, Report
from nbl_export.settings.measuring import DiffBounds
from nbl_export.verify.parity.figures import MethodLoss
from nbl_export.verify.speed.values import LEAST_ROUNDS, Ratio, Result, Speed

Unlike = Literal["on other text", "on another machine", "over another base"]
Judged = tuple[bool, str]
# Half a 95 % interval that compares two medians, in interquartile ranges over √rounds (McGill, Tukey, Larsen 1978).
_NOTCH = 1.57
# The files that held-out text or images come from, and how near two perplexities of one text are.
_HELD_OUT = ("nbl/text.safetensors", "nbl/images.safetensors")
_SAME_TEXT = 1e-3
_NAMED = 5  # things that a sentence lists
_ROUNDING = 1e-12  # of two divisions, as a share


def same_text(a: Report, b: Report) -> bool:
    """Whether both losses are of the same held-out data: by its digest, or by what the original makes of it."""
    one, other = a.method_loss, b.method_loss
    if any(a.hashes.get(name, "") == b.hashes.get(name) for name in _HELD_OUT):
        return True
    if not (isinstance(one, MethodLoss) and isinstance(other, MethodLoss)):
        return False
    same = (one.documents, one.tokens) == (other.documents, other.tokens)
    return same and math.isclose(one.perplexity_original, other.perplexity_original, rel_tol=_SAME_TEXT)


# speed -------------------------------------------------------------------------------------------


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

    @property
    def cells(self) -> dict[str, tuple[Result, Ratio]]:
        """The linearized candidate by cell, wherever it was timed beside its base."""
        return {cell.name: (result, over) for cell, result, over in self.speed.speedups()}


def races_of(side: Opened) -> dict[str, Race]:
    """The races of one side by the titles of their sections."""
    report, bench, graph = side.report, side.bench, None
    timed: dict[str, tuple[Speed | None, Environment]] = {}
    if report:
        # Names of tensors are part of the file's size, and of nothing that takes time.
        before = replace(report.graph.before, file_bytes=0)
        graph = (before, report.graph.precision, report.graph.kv_cache)
        for name, title in (("speed", SPEED), ("engine_speed", ENGINE_SPEED)):
            timed[title] = getattr(report, name), report.kept.get(name, report).environment
    if bench:
        timed[BENCH] = bench.speed, bench.environment
    return {
        title: Race(
            speed, where, (graph, next((c.cost for c in speed.candidates if c.name == speed.base), None))
        )
        for title, (speed, where) in timed.items()
        if speed
    }


def unlike(a: Race | None, b: Race | None) -> tuple[Unlike | None, tuple[str, ...]]:
    """Why speedups of two races do not compare, and that and what else a reader should know of them."""
    if a is None or b is None:
        return None, ()
    if a.machine != b.machine:
        why = f"Times and speedups do not compare: A on {a.machine}; B on {b.machine}."
        return "on another machine", (why,)
    own, other = a.environment.packages, b.environment.packages
    both = [(name, own.get(name, "none"), other.get(name, "none")) for name in sorted({**own, **other})]
    versions = ", ".join(f"{name} {one} → {two}" for name, one, two in both if one != two)
    notes = (f"Other versions, of which a difference may come: {versions}.",) if versions else ()
    if a.base == b.base:
        return None, notes
    why = "The unmodified graphs differ, so that speedups over them do not compare; the times beside them do."
    return "over another base", (why, *notes)


def _times_as_long(a: Race, b: Race, cell: str) -> tuple[float, float, float] | None:
    """How many times as long B takes in a cell, and its 95 % interval: by speedups over the same base, or by times."""
    (result, over), (result_b, over_b) = a.cells[cell], b.cells[cell]
    # A speedup that falls is a time that rises.
    one, other = ((r.value, r.least, r.most) for r in (over, over_b))
    if a.base != b.base:
        one, other = _median(result_b), _median(result)
    if not all(0 < number < math.inf for number in (*one, *other)):
        return None
    return one[0] / other[0], one[1] / other[2], one[2] / other[1]


def _median(result: Result) -> tuple[float, float, float]:
    """The median in milliseconds, and how far two of them may be apart by chance."""
    timing, known = result.timing, result.rounds >= LEAST_ROUNDS
    half = _NOTCH * (timing.high_ms - timing.low_ms) / math.sqrt(result.rounds) if known else math.nan
    return timing.median_ms, timing.median_ms - half, timing.median_ms + half


# gates -------------------------------------------------------------------------------------------


def gates(a: Opened, b: Opened, bounds: DiffBounds) -> tuple[Check, ...]:
    """One verdict on the checks of reports, and one for each bound that there is."""
    asked: tuple[tuple[str, Callable[[Opened, Opened, float], Judged], float | None], ...] = (
        ("perplexity increase", _perplexity, bounds.max_ppl_increase),
        ("slowdown", _slowdown, bounds.max_slowdown),
        ("size increase", _size, bounds.max_size_increase),
    )
    judged = [(name, judge(a, b, bound)) for name, judge, bound in asked if bound is not None]
    found = [("checks", _checks(a, b)), *judged]
    return tuple(Check(name, "passed" if one[0] else "failed", one[1]) for name, one in found if one)


def _checks(a: Opened, b: Opened) -> Judged | None:
    """Fails for a check of B that has failed and had not in A, whether it was there or not; none without checks."""
    judged = b.checks()
    before, after = ({n: c.status for n, c in side.items()} for side in (a.checks(), judged))
    if not before and not after:
        return None
    failed = [
        f"{name} failed in B and was {before.get(name, 'not there')} in A ({judged[name].detail})"
        for name, status in after.items()
        if status == "failed" != before.get(name)
    ]
    still = sum(status == "failed" == before.get(name) for name, status in after.items())
    open_ = [n for n, status in before.items() if status == "passed" and after.get(n, "skipped") == "skipped"]
    said = failed or ["none failed in B that had not in A"]
    said += [f"{still} failed in both"] if still else []
    said += [f"passed in A and not judged in B: {_listed(open_)}"] if open_ else []
    return not failed, "; ".join(said)


def _perplexity(a: Opened, b: Opened, bound: float) -> Judged:
    one, other = (side.report.method_loss if side.report else None for side in (a, b))
    if not (isinstance(one, MethodLoss) and isinstance(other, MethodLoss) and a.report and b.report):
        where = _lacking(isinstance(one, MethodLoss), isinstance(other, MethodLoss))
        return False, f"cannot be judged: there is no perplexity ratio in {where}"
    if not same_text(a.report, b.report):
        why = "the ratios are of different held-out texts: give both the same --calibration, sizes and --seed"
        return False, f"cannot be judged: {why}"
    before, after = one.perplexity_ratio, other.perplexity_ratio
    return _held(after, before, bound, f"perplexity ratio {before:.4f} in A, {after:.4f} in B")


def _size(a: Opened, b: Opened, bound: float) -> Judged:
    before, after = (side.summary.file_bytes if side.summary else 0 for side in (a, b))
    if not before or not after:
        return False, f"cannot be judged: no size of a graph is known in {_lacking(before, after)}"
    return _held(after, before, bound, f"{mebibytes(before)} in A, {mebibytes(after)} in B")


def _slowdown(a: Opened, b: Opened, bound: float) -> Judged:
    own, other = races_of(a), races_of(b)
    unknown: list[str] = []
    cells: list[tuple[str, tuple[float, float, float]]] = []
    for title in {**own, **other}:
        one, two = own.get(title), other.get(title)
        why, notes = unlike(one, two)
        if one is None or two is None:
            unknown.append(f"{title.lower()} was measured in {'A' if one else 'B'} alone")
        elif why == "on another machine":
            unknown.append(f"{title.lower()}: {notes[0]}".rstrip("."))
        else:
            timed = {cell: _times_as_long(one, two, cell) for cell in one.cells if cell in two.cells}
            unknown += [
                f"{cell} is on one side alone" for cell in sorted(one.cells.keys() ^ two.cells.keys())
            ]
            unknown += [
                f"{c} has no 95 % interval: measure at least six rounds" for c, t in timed.items() if not t
            ]
            cells += [(cell, times) for cell, times in timed.items() if times]
    if not cells and not unknown:
        return False, "cannot be judged: nothing was timed beside its base"
    slower = [
        f"{cell} takes {times:.2f} times as long, {least:.2f} at least"
        for cell, (times, least, _) in cells
        if _above(least, bound)
    ]
    said = [f"{_listed(slower)}: above the {bound:g} asked for"] if slower else []
    said += [f"cannot be judged: {_listed(unknown)}"] if unknown else []
    if said:
        return False, "; ".join(said)
    name, (value, _, most) = max(cells, key=lambda one: one[1][2])
    sure = sum(not _above(times[2], bound) for _, times in cells)
    rest = f", {len(cells) - sure} may be by noise" if sure < len(cells) else ""
    return True, (
        f"no cell surely takes more than the {bound:g} asked for; {sure} of {len(cells)} surely do not{rest} "
        f"({name}: {value:.2f} times as long, {most:.2f} at most)"
    )


def _held(after: float, before: float, bound: float, said: str) -> Judged:
    """Whether ``after`` is at most ``bound`` times ``before``."""
    times = after / before if before else math.nan
    above = _above(times, bound)
    return not above, f"{said}: {times:.4f} times, {'above' if above else 'within'} the {bound:g} asked for"


def _above(factor: float, bound: float) -> bool:
    """At the bound exactly, however the division is rounded, it is not above; what is no number is."""
    return not factor <= bound * (1 + _ROUNDING)


def _lacking(a: object, b: object) -> str:
    return "either" if not a and not b else "B" if a else "A"


def _listed(sentences: list[str]) -> str:
    more = [f"and {len(sentences) - _NAMED} more"] if len(sentences) > _NAMED else []
    return "; ".join([*sentences[:_NAMED], *more])
