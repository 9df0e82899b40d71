"""What two reports or two graphs have in common and what not: plain values, and when a difference is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nbl_export.checks import Check
from nbl_export.settings.bounds import DiffBounds

Kind = Literal["report", "bench", "eval", "graph"]
# Which way a figure is better; of a check: when it has passed.
Better = Literal["", "lower", "higher", "passed"]
Unlike = Literal["on other text", "on another machine", "over another base"]
Effect = (
    Literal[
        "same", "within noise", "of unknown noise", "better", "worse", "changed", "only in A", "only in B"
    ]
    | Unlike
)
# A difference of two values is noise up to this many of its standard errors.
_ERRORS = 2.0


@dataclass(frozen=True)
class Figure:
    """A value and its noise, if it has any: a standard error, or a 95 % interval from ``least`` to ``most``.

    An error or a bound that is no number is not known.
    """

    value: float | int | str
    se: float | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Fact:
    """A figure of one side. ``better`` says which way it is, ``unit`` how it is drawn.

    ``headline``: it is among the first that a reader looks for. ``detail`` stands beside it; ``members`` are what it
    lists.
    """

    figure: Figure
    better: Better = ""
    unit: str = ""
    headline: bool = False
    detail: str = ""
    members: tuple[str, ...] = ()


Facts = Mapping[str, Fact]


@dataclass(frozen=True)
class Change:
    """One figure on both sides, None on the side that lacks it, and what its difference is."""

    what: str
    a: Figure | None
    b: Figure | None
    effect: Effect
    unit: str = ""
    headline: bool = False
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What belongs together; ``notes`` say what is missing on a side, and why figures do not compare."""

    title: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """What was compared: where it is, of which model, made when and by which version, with which verdict of its own.

    A graph has neither of the last three.
    """

    path: str
    model: str = ""
    created: str = ""
    tool_version: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Diff:
    """The comparison of B with A.

    ``difference`` is ``none`` where all figures are the same, ``noise`` where none differs by more than its noise. The
    ``checks`` are those of the ``bounds``, and of reports one more: whether a check of B has failed that had not in A.
    ``verdict`` is ``no gate`` where there is none.
    """

    kind: Kind
    a: Side
    b: Side
    difference: Literal["none", "noise", "changed"]
    verdict: Literal["passed", "failed", "no gate"]
    checks: tuple[Check, ...]
    sections: tuple[Section, ...]
    bounds: DiffBounds
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No gate failed."""
        return self.verdict != "failed"

    @property
    def changes(self) -> tuple[Change, ...]:
        """Those of all sections."""
        return tuple(change for section in self.sections for change in section.changes)

    @property
    def headlines(self) -> tuple[Change, ...]:
        """What a reader looks for first."""
        return tuple(change for change in self.changes if change.headline)


def diff_of(
    kind: Kind,
    sides: tuple[Side, Side],
    sections: tuple[Section, ...],
    checks: tuple[Check, ...],
    bounds: DiffBounds,
    notes: tuple[str, ...] = (),
) -> Diff:
    """The comparison with its verdict."""
    effects = {change.effect for section in sections for change in section.changes}
    failed = any(check.status == "failed" for check in checks)
    return Diff(
        kind=kind,
        a=sides[0],
        b=sides[1],
        difference="none"
        if effects <= {"same"}
        else "noise"
        if effects <= {"same", "within noise"}
        else "changed",
        verdict="failed" if failed else "passed" if checks else "no gate",
        checks=checks,
        sections=sections,
        bounds=bounds,
        notes=notes,
    )


def section(
    title: str,
    a: Facts,
    b: Facts,
    unlike: Unlike | None = None,
    notes: tuple[str, ...] = (),
) -> Section:
    """Both sides' facts by name; ``unlike`` is why no figure of one side is better than the other's."""
    changes = (change(name, a.get(name), b.get(name), unlike) for name in {**a, **b})
    return Section(title, tuple(changes), notes)


def change(what: str, a: Fact | None, b: Fact | None, unlike: Unlike | None = None) -> Change:
    """What became of one fact; one of both sides is there."""
    known = b or a
    assert known is not None, "a fact of neither side"
    if a is None or b is None:
        effect: Effect = "only in B" if a is None else "only in A"
        note = known.detail
    else:
        effect = _effect(a.figure, b.figure, known.better)
        effect = "changed" if effect == "same" and set(a.members) != set(b.members) else effect
        effect = unlike if unlike and effect != "same" else effect
        note = _moved(a.members, b.members) or (
            a.detail if a.detail == b.detail else f"{a.detail or 'none'} → {b.detail or 'none'}"
        )
    one, other = (fact.figure if fact else None for fact in (a, b))
    return Change(what, one, other, effect, known.unit, known.headline, note)


def _moved(a: tuple[str, ...], b: tuple[str, ...]) -> str:
    """What a list has lost and gained, in words."""
    lists = (("added", [m for m in b if m not in a]), ("removed", [m for m in a if m not in b]))
    return "; ".join(f"{word} {', '.join(members)}" for word, members in lists if members)


def _effect(a: Figure, b: Figure, better: Better) -> Effect:
    one, other = a.value, b.value
    if one == other or (one != one and other != other):
        return "same"
    if isinstance(one, str) or isinstance(other, str):
        if better == "passed" and "failed" in (one, other):
            return "worse" if other == "failed" else "better"
        return "changed"
    if math.isfinite(one) and math.isfinite(other) and (noise := _noise(a, b)):
        return noise
    if not better:
        return "changed"
    # What is no number is worse than any.
    rises = other > one if one == one and other == other else (other != other) == (better == "lower")
    return "worse" if rises == (better == "lower") else "better"


def _noise(a: Figure, b: Figure) -> Effect | None:
    """Whether the difference is noise, or whether that is not known; None where it is more, or exact."""
    if (
        a.se is not None
        and b.se is not None
        and not isinstance(a.value, str)
        and not isinstance(b.value, str)
    ):
        error = math.hypot(a.se, b.se)
        if not math.isfinite(error):
            return "of unknown noise"
        return "within noise" if abs(b.value - a.value) <= _ERRORS * error else None
    bounds = [bound for bound in (a.least, a.most, b.least, b.most) if bound is not None]
    if len(bounds) < 4:
        return None
    if not all(map(math.isfinite, bounds)):
        return "of unknown noise"
    least_a, most_a, least_b, most_b = bounds
    return "within noise" if least_a <= most_b and least_b <= most_a else None
