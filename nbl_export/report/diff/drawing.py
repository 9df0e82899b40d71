"""A comparison as tables, and as Markdown for a pull request."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from nbl_export.errors import InputError
from nbl_export.files import open_data, write_text
from nbl_export.report.diff.values import Change, Diff, Figure, Section
from nbl_export.report.drawing import Table, figure, mebibytes, number
from nbl_export.report.render import filled
from nbl_export.report.tables import verdicts_table

# How its Markdown begins.
_TITLE = b"# nbl-export diff"
_PLAIN = ("same", "within noise")
_FACTOR = 10  # from which on it is said how many times as much a figure is, and not by which share
# What is good to know at once, before what merely differs.
_COUNTED = ("worse", "better", "changed", "only in A", "only in B")


def _whole(value: float) -> str:
    return f"{value:,}"


# How a figure of each unit is written.
_UNITS: Mapping[str, Callable[[float], str]] = {
    "": _whole,
    "bytes": mebibytes,
    "loss": lambda v: number(v, ".4f"),
    "error": figure,
    "times": lambda v: f"{number(v, '.2f')}×",
    "percent": lambda v: number(100 * v, ".1f"),
}


def verdict_line(diff: Diff) -> str:
    """What PASS or FAIL stands for, and how much differs."""
    failed = [check.name for check in diff.checks if check.status == "failed"]
    decided = failed or [check.name for check in diff.checks]
    said = f"({', '.join(decided)}); " if decided else ""
    return said + difference_in_words(diff)


def difference_in_words(diff: Diff) -> str:
    """How many figures differ, and how."""
    if diff.difference == "none":
        return "no difference"
    if diff.difference == "noise":
        return "no difference beyond noise"
    found: Counter[str] = Counter(change.effect for change in diff.changes if change.effect not in _PLAIN)
    count = sum(found.values())
    first = [f"{found.pop(effect)} {effect}" for effect in _COUNTED if effect in found]
    rest = [f"{many} {effect}" for effect, many in found.items()]
    return f"{count} figure{'s differ' if count != 1 else ' differs'}: {', '.join([*first, *rest])}"


def headline_table(diff: Diff, brief: bool = False) -> Table:
    """The figures that a reader looks for first."""
    return _table("From A to B", diff.headlines, brief)


def tables(diff: Diff, brief: bool = False) -> list[Table]:
    """The sections in which something differs; ``brief`` leaves out what differs by noise alone."""
    return [table for section in diff.sections if (table := _section(section, brief))]


def _section(section: Section, brief: bool) -> Table | None:
    left_out = _PLAIN if brief else ("same",)
    rows = [change for change in section.changes if change.effect not in left_out]
    if not rows and not section.notes:
        return None
    noise = sum(change.effect == "within noise" for change in section.changes) if brief else 0
    notes = [*section.notes, *([f"{noise} more within noise."] if noise else [])]
    return _table(section.title, rows, brief, " ".join(notes))


def unchanged(diff: Diff) -> list[str]:
    """The titles of sections in which all is the same."""
    return [s.title for s in diff.sections if not _section(s, False)]


def _table(title: str, changes: tuple[Change, ...] | list[Change], brief: bool, note: str = "") -> Table:
    """A row for each change; its note has a column of its own, but where there is little room."""
    noted = not brief and any(change.note for change in changes)
    rows = (
        (change.what, *_pair(change), _effect(change, brief), *([change.note] if noted else []))
        for change in changes
    )
    return Table(title, ("", "A", "B", "change", *(["note"] if noted else [])), tuple(rows), note)


def _pair(change: Change) -> tuple[str, str]:
    """Both figures as text; those that differ are not written alike."""
    a, b = (_shown(one, change.unit) for one in (change.a, change.b))
    if a == b and change.a and change.b and change.a.value != change.b.value:
        return _apart(change.a.value, change.b.value)
    return a, b


def _apart(a: float | str, b: float | str) -> tuple[str, str]:
    """Two numbers by as many digits as tell them apart."""
    if isinstance(a, int) and isinstance(b, int):
        return f"{a:,}", f"{b:,}"
    pairs = ((number(a, f".{digits}g"), number(b, f".{digits}g")) for digits in range(5, 18))
    return next((pair for pair in pairs if pair[0] != pair[1]), (str(a), str(b)))


def _shown(one: Figure | None, unit: str) -> str:
    if one is None:
        return "none"
    if isinstance(one.value, str):
        return one.value
    text = _UNITS[unit](one.value)
    if one.se is not None:
        return f"{text} ± {_UNITS[unit](one.se)}" if math.isfinite(one.se) else text
    if (
        one.least is not None
        and one.most is not None
        and math.isfinite(one.least)
        and math.isfinite(one.most)
    ):
        return f"{text} ({one.least:.2f} to {one.most:.2f})"
    return text


def _effect(change: Change, brief: bool) -> str:
    """By how much, and what that means; where there is little room, also what a list has gained and lost."""
    if change.effect == "same":
        return "="
    how = _relative(change)
    if change.effect != "changed":
        return f"{how}, {change.effect}" if how else change.effect
    return how or (change.note if brief and change.note else change.effect)


def _relative(change: Change) -> str:
    """By what share or factor the figure changed, where it is one of both sides."""
    if change.a is None or change.b is None:
        return ""
    a, b = change.a.value, change.b.value
    if (
        isinstance(a, str)
        or isinstance(b, str)
        or not a
        or not math.isfinite(a)
        or not math.isfinite(b)
        or a == b
    ):
        return ""
    return f"× {b / a:,.0f}" if b / a >= _FACTOR else f"{(b - a) / abs(a):+.1%}"


def write_markdown(path: Path, diff: Diff) -> None:
    """Write :func:`markdown` to ``path``, atomically.

    Raises :class:`InputError` for a file that holds something else, as one that is compared does.
    """
    if path.is_dir():
        raise InputError(f"--markdown {path} is a folder: name a file.")
    if not path.parent.is_dir():
        raise InputError(
            f"--markdown {path}: there is no folder {path.parent}; make it, or name another file."
        )
    if path.exists():
        with open_data(path) as file:
            begins = file.read(len(_TITLE))
        if begins not in (b"", _TITLE):
            raise InputError(
                f"--markdown {path} is there already and is no comparison of nbl-export: name another file (to append "
                "to a page: --markdown - >> FILE)."
            )
    write_text(path, markdown(diff))


def markdown(diff: Diff) -> str:
    """The comparison as GitHub-flavoured Markdown: verdict and headline figures, then the tables, folded."""
    return filled(
        "diff.md.j2",
        diff=diff,
        verdict=verdict_line(diff),
        headlines=headline_table(diff),
        checks=verdicts_table(diff.checks),
        tables=tables(diff),
        unchanged=unchanged(diff),
    )
