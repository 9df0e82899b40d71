"""Two reports, benches, evaluations or graphs → what changed from A to B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbl_export.errors import InputError
from nbl_export.report.diff.facts import (
    check_facts,
    engine_facts,
    environment_facts,
    file_facts,
    loss_facts,
    model_facts,
    parity_facts,
    same_text,
    speed_facts,
    summary_facts,
    task_facts,
)
from nbl_export.report.diff.gates import gates
from nbl_export.report.diff.races import BENCH, ENGINE_SPEED, SPEED, races_of, unlike
from nbl_export.report.diff.sides import Opened, opened
from nbl_export.report.diff.values import Diff, Facts, Section, Unlike, diff_of, section
from nbl_export.settings.bounds import DiffBounds

_KINDS = {"report": "a report", "bench": "a bench", "eval": "an evaluation", "graph": "a graph"}
_LOSS, _PARITY, _FILE = "Method loss", "Parity", "Graph file"
# What a section has of a side, in reading order; races are headlines of a report and of a bench alone.
_OF: dict[str, Callable[[Opened], Facts]] = {
    "Model and settings": lambda s: model_facts(s.header),
    _LOSS: lambda s: loss_facts(s.report.method_loss if s.report else None),
    SPEED: lambda s: speed_facts(s.report.speed if s.report else None, headline=True),
    ENGINE_SPEED: lambda s: speed_facts(s.report.engine_speed if s.report else None, headline=True),
    BENCH: lambda s: speed_facts(s.bench.speed if s.bench else None, headline=s.kind == "bench"),
    "Tasks and retrieval": lambda s: task_facts(s.evaluation),
    "Checks": lambda s: check_facts(s.report, s.bench, s.evaluation),
    _PARITY: lambda s: parity_facts(s.report.parity if s.report else None),
    "Engines": lambda s: engine_facts(s.report),
    "Graph": lambda s: summary_facts(s.summary),
    _FILE: lambda s: file_facts(s.graph, headline=s.kind == "graph"),
    "Unmodified graph": lambda s: summary_facts(s.report.graph.before if s.report else None, headline=False),
    "Environment": lambda s: environment_facts(s.header),
}
# The check that says why a section was not measured.
_SKIPPED = {
    _LOSS: "method loss",
    SPEED: "speed",
    _PARITY: "parity",
    ENGINE_SPEED: "engine run",
    "Engines": "engine run",
}


def diff(
    a: str | Path, b: str | Path, bounds: DiffBounds | None = None, markdown: str | Path | None = None
) -> Diff:
    """What changed from ``a`` to ``b``: output folders, reports, benches, evaluations or graphs.

    A regression is in the value (``passed`` is False), not raised. ``markdown`` is a file to write it to as Markdown.
    """
    from nbl_export.report.diff.drawing import write_markdown

    asked = bounds or DiffBounds()
    asked.check()
    value = compare(Path(a), Path(b), asked)
    if markdown is not None:
        write_markdown(Path(markdown), value)
    return value


def compare(a: Path, b: Path, bounds: DiffBounds) -> Diff:
    """What changed from ``a`` to ``b``, and whether the ``bounds`` are kept.

    Raises :class:`InputError` for what cannot be read, and for two of different kinds.
    """
    one, other = opened(a), opened(b)
    if one.kind != other.kind:
        kinds = f"A ({a}) is {_KINDS[one.kind]} and B ({b}) is {_KINDS[other.kind]}"
        raise InputError(f"{kinds}: give two of one kind.")
    sections = (_section(title, one, other) for title in _OF)
    return diff_of(
        one.kind,
        (one.side, other.side),
        tuple(part for part in sections if part),
        gates(one, other, bounds),
        bounds,
        (*(f"A: {note}" for note in one.notes), *(f"B: {note}" for note in other.notes)),
    )


def _section(title: str, a: Opened, b: Opened) -> Section | None:
    own, other = _OF[title](a), _OF[title](b)
    if own and other:
        return section(title, own, other, *_unlike(title, a, b))
    lacking = _missing(title, "B" if own else "A", b if own else a)
    return section(title, own, other, notes=(lacking,)) if own or other else None


def _unlike(title: str, a: Opened, b: Opened) -> tuple[Unlike | None, tuple[str, ...]]:
    """Why the figures of a section do not compare, and what a reader should know of them."""
    if title in (SPEED, ENGINE_SPEED, BENCH):
        return unlike(races_of(a).get(title), races_of(b).get(title))
    if title == _LOSS and a.report and b.report and not same_text(a.report, b.report):
        return "on other text", ("The losses are of different held-out texts, and do not compare.",)
    return None, ()


def _missing(title: str, name: str, side: Opened) -> str:
    """That one side has nothing of a section, and why, if it says so."""
    if title == _FILE:
        return f"{name} is a report without its graph."
    checks = side.header.checks if side.header else ()
    why = [c.detail for c in checks if c.name == _SKIPPED.get(title) and c.status != "passed"]
    return f"{name} has none{f' ({why[0]})' if why else ''}."
