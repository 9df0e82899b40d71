"""The gates of a comparison: what B may cost beside A. What a bound asks for and cannot be judged has failed."""

from __future__ import annotations

import math
from collections.abc import Callable

from nbl_export.checks import Check
from nbl_export.report.diff.facts import named_checks, same_text
from nbl_export.report.diff.races import cells, races_of, slowdowns, unlike
from nbl_export.report.diff.sides import Opened
from nbl_export.report.drawing import mebibytes
from nbl_export.settings.bounds import DiffBounds
from nbl_export.verify.loss.figures import MethodLoss

_NAMED = 5  # things that a sentence lists
_ROUNDING = 1e-12  # of two divisions, as a share


def gates(a: Opened, b: Opened, bounds: DiffBounds) -> tuple[Check, ...]:
    """One verdict on the checks of reports, and one for each bound that there is."""
    found = _checks(a, b)
    asked: tuple[tuple[str, float | None, Callable[[Opened, Opened, float], tuple[bool, str]]], ...] = (
        ("perplexity increase", bounds.max_ppl_increase, _perplexity),
        ("slowdown", bounds.max_slowdown, _slowdown),
        ("size increase", bounds.max_size_increase, _size),
    )
    for name, bound, judge in asked:
        if bound is not None:
            within, said = judge(a, b, bound)
            found.append(Check(name, "passed" if within else "failed", said))
    return tuple(found)


def _checks(a: Opened, b: Opened) -> list[Check]:
    """Fails for a check of B that has failed and had not in A, whether it was there or not; none without checks."""
    own, other = (named_checks(side.report, side.bench, side.evaluation) for side in (a, b))
    if not own and not other:
        return []
    before, after = ({name: check.status for name, check in judged.items()} for judged in (own, other))
    failed = [
        f"{name} failed in B and was {before.get(name, 'not there')} in A ({check.detail})"
        for name, check in other.items()
        if check.status == "failed" and before.get(name) != "failed"
    ]
    still = sum(status == "failed" and before.get(name) == "failed" for name, status in after.items())
    open_ = [n for n, status in before.items() if status == "passed" and after.get(n, "skipped") == "skipped"]
    said = failed or ["none failed in B that had not in A"]
    said += [f"{still} failed in both"] if still else []
    said += [f"passed in A and not judged in B: {_listed(open_)}"] if open_ else []
    return [Check("checks", "failed" if failed else "passed", "; ".join(said))]


def _perplexity(a: Opened, b: Opened, bound: float) -> tuple[bool, str]:
    losses = [side.report.method_loss if side.report else None for side in (a, b)]
    one, other = (loss if isinstance(loss, MethodLoss) else None for loss in losses)
    if not (one and other and a.report and b.report):
        return _unjudged(f"there is no perplexity ratio in {_lacking(one, other)}")
    if not same_text(a.report, b.report):
        return _unjudged(
            "the ratios are of different held-out texts: give both the same --calibration, sizes and --seed"
        )
    before, after = one.perplexity_ratio, other.perplexity_ratio
    return _held(after, before, bound, f"perplexity ratio {before:.4f} in A, {after:.4f} in B")


def _size(a: Opened, b: Opened, bound: float) -> tuple[bool, str]:
    before, after = (side.summary.file_bytes if side.summary else 0 for side in (a, b))
    if not before or not after:
        return _unjudged(f"no size of a graph is known in {_lacking(before, after)}")
    return _held(after, before, bound, f"{mebibytes(before)} in A, {mebibytes(after)} in B")


def _slowdown(a: Opened, b: Opened, bound: float) -> tuple[bool, str]:
    own, other = races_of(a), races_of(b)
    unknown, slower, found = [], [], []
    for title in {**own, **other}:
        if title not in own or title not in other:
            unknown.append(f"{title.lower()} was measured in {'A' if title in own else 'B'} alone")
            continue
        one, two = own[title], other[title]
        why, notes = unlike(one, two)
        if why == "on another machine":
            unknown.append(f"{title.lower()}: {notes[0]}".rstrip("."))
            continue
        alone = cells(one.speed).keys() ^ cells(two.speed).keys()
        unknown += [f"{cell} is on one side alone" for cell in sorted(alone)]
        for cell in slowdowns(one, two):
            if math.isnan(cell.value):
                unknown.append(f"{cell.cell} has no 95 % interval: measure at least six rounds")
            elif _above(cell.least, bound):
                slower.append(f"{cell.cell} takes {cell.value:.2f} times as long, {cell.least:.2f} at least")
            else:
                found.append(cell)
    if not (found or slower or unknown):
        return _unjudged("nothing was timed beside its base")
    said = [f"{_listed(slower)}: above the {bound:g} asked for"] if slower else []
    said += [f"cannot be judged: {_listed(unknown)}"] if unknown else []
    if said:
        return False, "; ".join(said)
    worst = max(found, key=lambda cell: cell.most)
    sure = sum(not _above(cell.most, bound) for cell in found)
    rest = f", {len(found) - sure} may be by noise" if sure < len(found) else ""
    return True, (
        f"no cell surely takes more than the {bound:g} asked for; {sure} of {len(found)} surely do not{rest} "
        f"({worst.cell}: {worst.value:.2f} times as long, {worst.most:.2f} at most)"
    )


def _held(after: float, before: float, bound: float, said: str) -> tuple[bool, str]:
    """Whether ``after`` is at most ``bound`` times ``before``."""
    times = after / before if before else math.nan
    above = _above(times, bound)
    return not above, f"{said}: {times:.4f} times, {'above' if above else 'within'} the {bound:g} asked for"


def _above(factor: float, bound: float) -> bool:
    """At the bound exactly, however the division is rounded, it is not above; what is no number is."""
    return not factor <= bound * (1 + _ROUNDING)


def _unjudged(why: str) -> tuple[bool, str]:
    return False, f"cannot be judged: {why}"


def _lacking(a: object, b: object) -> str:
    return "either" if not a and not b else "B" if a else "A"


def _listed(sentences: list[str]) -> str:
    more = len(sentences) - _NAMED
    return "; ".join(sentences[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
