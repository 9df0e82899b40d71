"""Compare two reports, benches, evaluations or graphs, and draw the comparison as tables and as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbl_export.errors import InputError
from nbl_export.files import write_text
from nbl_export.records import Check
from nbl_export.report.diff_facts import (
    BENCH,
    ENGINE_SPEED,
    LOSS,
    SPEED,
    Better,
    Fact,
    Facts,
    Figure,
    Kind,
    Opened,
    opened,
    sections_of,
)
from nbl_export.report.diff_gates import Unlike, gates, races_of, same_text, unlike
from nbl_export.report.drawing import Table, figure, finite, mebibytes, number
from nbl_export.report.render import filled
from nbl_export.report.tables import verdicts_table
from nbl_export.settings.measuring import DiffBounds

Effect = (
    Literal[
        "same", "within noise", "of unknown noise", "better", "worse", "changed", "only in A", "only in B"
    ]
    | Unlike
)
_KINDS = {"report": "a report", "bench": "a bench", "eval": "an evaluation", "graph": "a graph"}
# The check that says why a section was not measured.
_SKIPPED = {
    LOSS: "method loss",
    SPEED: "speed",
    "Parity": "parity",
    ENGINE_SPEED: "engine run",
    "Engines": "engine run",
}
# A difference of two values is noise up to this many of its standard errors.
_ERRORS = 2.0
# How its Markdown begins.
_TITLE = b"# nbl-export diff"
_PLAIN: tuple[Effect, ...] = ("same", "within noise")
_FACTOR = 10  # from which on it is said how many times as much a figure is, and not by which share
# What is good to know at once, before what merely differs.
_COUNTED = ("worse", "better", "changed", "only in A", "only in B")
# How a figure of each unit is written.
_UNITS: Mapping[str, Callable[[float], str]] = {
    "": lambda v: f"{v:,}",
    "bytes": mebibytes,
    "loss": lambda v: number(v, ".4f"),
    "error": figure,
    "times": lambda v: f"{number(v, '.2f')}×",
    "percent": lambda v: number(100 * v, ".1f"),
}


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
class Diff:
    """The comparison of B with A.

    ``a`` and ``b`` say of each side its ``path``, its ``model``, when it was ``created``, by which ``tool_version`` and
    with which ``verdict`` of its own; of a graph the path alone. ``difference`` is ``none`` where all figures are the
    same, ``noise`` where none differs by more than its noise. The ``checks`` are those of the ``bounds``, and of
    reports one more: whether a check of B has failed that had not in A. ``verdict`` is ``no gate`` without any.
    """

    kind: Kind
    a: Mapping[str, str]
    b: Mapping[str, str]
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


def diff(
    a: str | Path, b: str | Path, bounds: DiffBounds | None = None, markdown: str | Path | None = None
) -> Diff:
    """What changed from ``a`` to ``b``: output folders, reports, benches, evaluations or graphs.

    A regression is in the value (``passed`` is False), not raised. ``markdown`` is a file to write it to as Markdown.
    Raises :class:`InputError` for what cannot be read, and for two of different kinds.
    """
    asked = bounds or DiffBounds()
    asked.check()
    one, other = opened(Path(a)), opened(Path(b))
    if one.kind != other.kind:
        kinds = f"A ({a}) is {_KINDS[one.kind]} and B ({b}) is {_KINDS[other.kind]}"
        raise InputError(f"{kinds}: give two of one kind.")
    facts = {title: (own, sections_of(other)[title]) for title, own in sections_of(one).items()}
    sections = tuple(_section(title, one, other, *both) for title, both in facts.items() if any(both))
    effects = {change.effect for section in sections for change in section.changes}
    checks = gates(one, other, asked)
    failed = any(check.status == "failed" for check in checks)
    value = Diff(
        kind=one.kind,
        a=_side(one),
        b=_side(other),
        difference="none" if effects <= {"same"} else "noise" if effects <= set(_PLAIN) else "changed",
        verdict="failed" if failed else "passed" if checks else "no gate",
        checks=checks,
        sections=sections,
        bounds=asked,
        notes=(*(f"A: {note}" for note in one.notes), *(f"B: {note}" for note in other.notes)),
    )
    if markdown is not None:
        write_markdown(Path(markdown), value)
    return value


def _side(side: Opened) -> dict[str, str]:
    own = side.header
    said = [own.model.source, own.created, own.tool_version, own.verdict] if own else [""] * 4
    names = ("path", "model", "created", "tool_version", "verdict")
    return dict(zip(names, [str(side.path), *said], strict=True))


def _section(title: str, a: Opened, b: Opened, own: Facts, other: Facts) -> Section:
    why: Unlike | None = None
    notes: tuple[str, ...] = ()
    if not own or not other:
        name, side = ("A", a) if other else ("B", b)
        checks = side.header.checks if side.header else ()
        skipped = (c.detail for c in checks if c.status != "passed" and c.name == _SKIPPED.get(title))
        reason = next(skipped, "")
        notes = (f"{name} has none{f' ({reason})' if reason else ''}.",)
    elif title in (SPEED, ENGINE_SPEED, BENCH):
        why, notes = unlike(races_of(a).get(title), races_of(b).get(title))
    elif title == LOSS and a.report and b.report and not same_text(a.report, b.report):
        why, notes = "on other text", ("The losses are of different held-out texts, and do not compare.",)
    changes = (change(name, own.get(name), other.get(name), why) for name in {**own, **other})
    return Section(title, tuple(changes), notes)


# one figure --------------------------------------------------------------------------------------


def change(what: str, a: Fact | None, b: Fact | None, unlike: Unlike | None = None) -> Change:
    """What became of one fact; one of both sides is there. ``unlike``: why neither is better."""
    known = b or a
    assert known is not None, "a fact of neither side"
    effect: Effect = "only in A" if a else "only in B"
    note = known.detail
    if a is not None and b is not None:
        lists = (("added", a.members, b.members), ("removed", b.members, a.members))
        moved = [(word, [m for m in members if m not in before]) for word, before, members in lists]
        effect = _effect(a.figure, b.figure, known.better)
        note = "; ".join(f"{word} {', '.join(members)}" for word, members in moved if members)
        if note or effect != "same":
            effect = unlike or ("changed" if effect == "same" else effect)
        note = note or (a.detail if a.detail == b.detail else f"{a.detail or 'none'} → {b.detail or 'none'}")
    one, other = (fact.figure if fact else None for fact in (a, b))
    return Change(what, one, other, effect, known.unit, known.headline, note)


def _effect(a: Figure, b: Figure, better: Better) -> Effect:
    one, other = a.value, b.value
    if one == other or (one != one and other != other):
        return "same"
    if isinstance(one, str) or isinstance(other, str):
        judged = better == "passed" and "failed" in (one, other)
        return "changed" if not judged else "worse" if other == "failed" else "better"
    if math.isfinite(one) and math.isfinite(other) and (noise := _noise(a, b, abs(other - one))):
        return noise
    # What is no number is worse than any.
    rises = other > one if one == one and other == other else (other != other) == (better == "lower")
    return "changed" if not better else "worse" if rises == (better == "lower") else "better"


def _noise(a: Figure, b: Figure, difference: float) -> Effect | None:
    """Whether the difference is noise, or whether that is not known; None where it is more, or exact."""
    bounds = [bound for bound in (a.least, a.most, b.least, b.most) if bound is not None]
    if a.se is not None and b.se is not None:
        error = math.hypot(a.se, b.se)
        known, noise = math.isfinite(error), difference <= _ERRORS * error
    elif len(bounds) == 4:
        known, noise = all(map(math.isfinite, bounds)), bounds[0] <= bounds[3] and bounds[2] <= bounds[1]
    else:
        return None
    return "of unknown noise" if not known else "within noise" if noise else None


# drawing -----------------------------------------------------------------------------------------


def verdict_line(diff: Diff) -> str:
    """What PASS or FAIL stands for, and how many figures differ, and how."""
    names = [check.name for check in diff.checks if check.status == "failed"] or [c.name for c in diff.checks]
    said = f"({', '.join(names)}); " if names else ""
    if diff.difference != "changed":
        return f"{said}no difference{' beyond noise' * (diff.difference == 'noise')}"
    found: Counter[str] = Counter(change.effect for change in diff.changes if change.effect not in _PLAIN)
    each = ", ".join(
        f"{found[effect]} {effect}" for effect in {**dict.fromkeys(_COUNTED), **found} if found[effect]
    )
    count = sum(found.values())
    return f"{said}{count} figure{'s differ' if count != 1 else ' differs'}: {each}"


def headline_table(diff: Diff, brief: bool = False) -> Table:
    """The figures that a reader looks for first."""
    return _table("From A to B", [change for change in diff.changes if change.headline], brief)


def tables(diff: Diff, brief: bool = False) -> list[Table]:
    """The sections in which something differs; ``brief`` leaves out what differs by noise alone."""
    found, plain = [], _PLAIN if brief else ("same",)
    for section in diff.sections:
        rows = [change for change in section.changes if change.effect not in plain]
        noise = sum(change.effect == "within noise" for change in section.changes) if brief else 0
        if rows or noise or section.notes:
            notes = [*section.notes, *([f"{noise} more within noise."] if noise else [])]
            found.append(_table(section.title, rows, brief, " ".join(notes)))
    return found


def _table(title: str, changes: Sequence[Change], brief: bool, note: str = "") -> Table:
    """A row for each change; its note has a column of its own, but where there is little room."""
    noted = not brief and any(change.note for change in changes)
    rows = (
        (change.what, *_pair(change), _effect_in_words(change, brief), *([change.note] if noted else []))
        for change in changes
    )
    return Table(title, ("", "A", "B", "change", *(["note"] if noted else [])), tuple(rows), note)


def _pair(change: Change) -> tuple[str, str]:
    """Both figures as text; those that differ are not written alike: by as many digits as tell them apart."""
    a, b = (_shown(one, change.unit) for one in (change.a, change.b))
    if a != b or not (change.a and change.b) or change.a.value == change.b.value:
        return a, b
    one, other = change.a.value, change.b.value
    pairs = ((number(one, f",.{digits}g"), number(other, f",.{digits}g")) for digits in range(5, 18))
    return next((pair for pair in pairs if pair[0] != pair[1]), (str(one), str(other)))


def _shown(one: Figure | None, unit: str) -> str:
    if one is None or isinstance(one.value, str):
        return str(one.value) if one else "none"
    text, draw = _UNITS[unit](one.value), _UNITS[unit]
    if one.se is not None and math.isfinite(one.se):
        return f"{text} ± {draw(one.se)}"
    ends = [end for end in (one.least, one.most) if end is not None and math.isfinite(end)]
    return f"{text} ({ends[0]:.2f} to {ends[1]:.2f})" if len(ends) == 2 else text


def _effect_in_words(change: Change, brief: bool) -> str:
    """By how much, and what that means; where there is little room, also what a list has gained and lost."""
    if change.effect == "same":
        return "="
    a, b = (finite(one.value) if one else None for one in (change.a, change.b))
    how = "" if not a or b is None else f"× {b / a:,.0f}" if b / a >= _FACTOR else f"{(b - a) / abs(a):+.1%}"
    if change.effect != "changed":
        return f"{how}, {change.effect}" if how else change.effect
    return how or (change.note if brief and change.note else change.effect)


def write_markdown(path: Path, diff: Diff) -> None:
    """Write :func:`markdown` to ``path``, atomically.

    Raises :class:`InputError` for a file that holds something else, as one that is compared does.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--markdown {path}: name a file in a folder that is there.")
    if path.exists() and path.read_bytes()[: len(_TITLE)] not in (b"", _TITLE):
        raise InputError(
            f"--markdown {path} is there already and is no comparison of nbl-export: name another file (to append "
            "to a page: --markdown - >> FILE)."
        )
    write_text(path, markdown(diff))


def markdown(diff: Diff) -> str:
    """The comparison as GitHub-flavoured Markdown: verdict and headline figures, then the tables, folded."""
    drawn = tables(diff)
    return filled(
        "diff.md.j2",
        diff=diff,
        verdict=verdict_line(diff),
        headlines=headline_table(diff),
        checks=verdicts_table(diff.checks),
        tables=drawn,
        unchanged=[s.title for s in diff.sections if s.title not in {table.title for table in drawn}],
    )
