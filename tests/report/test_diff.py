"""Whole comparisons of real folders: what is in each section, what is missing, and the mirror of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.records import Check
from nbl_export.report.diff import (
    Change,
    Diff,
    Section,
    Side,
    change,
    compare,
    markdown,
    verdict_line,
    write_markdown,
)
from nbl_export.report.diff_facts import Better, Fact, Figure
from nbl_export.settings import DiffBounds
from tests.report.test_schema import bench  # noqa: F401

NONE = DiffBounds()
MIRRORED = {"better": "worse", "worse": "better", "only in A": "only in B", "only in B": "only in A"}


def by_name(diff: Diff, title: str) -> dict[str, Change]:
    (section,) = [s for s in diff.sections if s.title == title]
    return {change.what: change for change in section.changes}


def notes(diff: Diff, title: str) -> tuple[str, ...]:
    return next(s.notes for s in diff.sections if s.title == title)


def edited(out: Path, folder: Path, **changes: Any) -> Path:
    """The report of ``out`` with other sections, in a folder of its own."""
    raw = json.loads((out / "report" / "report.json").read_text())
    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", {**raw, **changes})
    return folder / "report.json"


def test_the_same_twice_is_no_difference(stories_out: Path) -> None:
    for where in (stories_out, stories_out / "report" / "report.json", stories_out / "model.onnx"):
        diff = compare(where, where, NONE)
        assert diff.difference == "none" and diff.passed
        assert {change.effect for change in diff.changes} == {"same"} and diff.changes


def test_two_k_differ_where_they_do(stories_out: Path, stories_three: Path) -> None:
    diff = compare(stories_out, stories_three, NONE)
    assert diff.difference == "changed" and diff.verdict == "passed"
    layers = by_name(diff, "Model and settings")["linear layers"]
    assert (layers.a and layers.a.value, layers.b and layers.b.value) == ("2 of 5: 2, 3", "3 of 5: 2-4")
    assert layers.note == "added 4" and layers.headline
    asked = {n for n, c in by_name(diff, "Model and settings").items() if c.effect != "same"}
    assert asked == {"linear layers", "select: k"}
    graph = by_name(diff, "Graph")
    assert (graph["nodes: Attention"].a.value, graph["nodes: Attention"].b.value) == (3, 2)  # type: ignore[union-attr]
    assert (
        graph["KV pairs (layers with a cache)"].effect == "changed"
        and graph["size on disk"].effect == "better"
    )
    assert by_name(diff, "Method loss")["perplexity ratio"].effect == "worse"
    assert by_name(diff, "Graph file")["linear layers in the graph"].note == "added 4"
    assert {change.effect for change in by_name(diff, "Unmodified graph").values()} == {"same"}
    assert notes(diff, "Method loss") == () == notes(diff, "Speed")


def test_what_is_missing_is_said_with_the_reason(stories_out: Path, tmp_path: Path) -> None:
    checks = [{"name": "speed", "status": "skipped", "detail": "not asked for (--no-speed)"}]
    report = edited(stories_out, tmp_path, speed=None, method_loss=None, checks=checks)
    diff = compare(stories_out, report, NONE)
    assert notes(diff, "Speed") == ("B has none (not asked for (--no-speed)).",)
    assert notes(diff, "Method loss") == ("B has none.",)
    assert notes(diff, "Graph file") == ("B has none.",)
    assert {c.effect for c in by_name(diff, "Speed").values()} == {"only in A"}
    assert by_name(diff, "Checks")["parity"].effect == "only in A"
    mirrored = compare(report, stories_out, NONE)
    assert notes(mirrored, "Speed") == ("A has none (not asked for (--no-speed)).",)


def test_two_kinds_are_refused(stories_out: Path) -> None:
    with pytest.raises(InputError) as told:
        compare(stories_out, stories_out / "model.onnx", NONE)
    assert str(told.value) == (
        f"A ({stories_out}) is a report and B ({stories_out / 'model.onnx'}) is a graph: give two of one kind."
    )


# one figure ----------------------------------------------------------------------------------------


def both(a: Fact | None, b: Fact | None) -> str:
    """The effect, after a look from the other side, which must be its mirror."""
    there, back = change("x", a, b), change("x", b, a)
    assert back.effect == MIRRORED.get(there.effect, there.effect)
    assert (back.a, back.b) == (there.b, there.a)
    return there.effect


def fact(value: float | str, better: Better = "", **noise: float) -> Fact:
    return Fact(Figure(value, **noise), better)


@pytest.mark.parametrize(
    ("a", "b", "better", "effect"),
    [
        (1, 1, "lower", "same"),
        (1, 2, "lower", "worse"),
        (2, 1, "lower", "better"),
        (1, 2, "higher", "better"),
        (1, 2, "", "changed"),
        ("x", "x", "", "same"),
        ("x", "y", "", "changed"),
        (nan, nan, "lower", "same"),
        (1.0, nan, "lower", "worse"),
        (nan, 1.0, "lower", "better"),
        (1.0, nan, "higher", "worse"),
        (nan, 1.0, "higher", "better"),
        (1.0, nan, "", "changed"),
        (1.0, inf, "lower", "worse"),
        ("passed", "failed", "passed", "worse"),
        ("skipped", "failed", "passed", "worse"),
        ("failed", "skipped", "passed", "better"),
        ("passed", "skipped", "passed", "changed"),
    ],
)
def test_exact_figures(a: float | str, b: float | str, better: Better, effect: str) -> None:
    assert both(fact(a, better), fact(b, better)) == effect


@pytest.mark.parametrize(
    ("difference", "effect"), [(0.0, "same"), (0.09, "within noise"), (0.1, "within noise"), (0.11, "worse")]
)
def test_two_standard_errors_of_the_difference(difference: float, effect: str) -> None:
    """Errors of 0.03 and 0.04 are one of 0.05."""
    a, b = fact(0.0, "lower", se=0.03), fact(difference, "lower", se=0.04)
    assert both(a, b) == effect


@pytest.mark.parametrize(
    ("least", "most", "effect"),
    [
        (1.25, 1.4, "better"),
        (1.2, 1.4, "within noise"),  # they touch
        (1.15, 1.4, "within noise"),
        (0.9, 1.09, "worse"),
        (-inf, inf, "of unknown noise"),
        (nan, nan, "of unknown noise"),
    ],
)
def test_intervals_that_are_apart(least: float, most: float, effect: str) -> None:
    a = fact(1.15, "higher", least=1.1, most=1.2)
    assert both(a, fact(1.3 if most > 1.2 else 1.0, "higher", least=least, most=most)) == effect


# drawing -------------------------------------------------------------------------------------------

EVIL = "</details><script>alert(1)</script>|`[x](javascript:y)\n| a |\x1b[2J# **b**"


def parsed(text: str) -> dict[str, list[list[str]]]:
    """The tables of a page by what folds them, the two above by ``gates`` and ``headlines``; all rows are as wide."""
    found: dict[str, list[list[str]]] = {}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    folded, opened = "", 0
    for number, token in enumerate(tokens):
        if token.type == "html_block":
            opened += token.content.count("<details>") - token.content.count("</details>")
            match = re.search(r"<summary>(.*?)(?: \(\d+\))?</summary>", token.content)
            folded = match[1] if match else folded
        elif token.type == "table_open":
            name = folded if opened else "headlines" if found else "gates"
            found[name] = []
        elif token.type == "tr_open":
            found[list(found)[-1]].append([])
        elif token.type in ("th_open", "td_open"):
            inline = tokens[number + 1].children or []
            found[list(found)[-1]][-1].append("".join(child.content for child in inline))
    assert opened == 0, "every fold is closed"
    for name, rows in found.items():
        assert {len(row) for row in rows} == {len(rows[0])}, name
    return found


def made(*changes: Change, checks: tuple[Check, ...] = (), **more: Any) -> Diff:
    part = Section("Part", changes, ("a note",))
    fields = {"difference": "changed", "verdict": "failed" if checks else "no gate", "checks": checks, **more}
    return Diff("report", Side("a"), Side("b"), sections=(part,), bounds=NONE, **fields)


def test_the_verdict_in_words() -> None:
    failed = Check("slowdown", "failed", "")
    worse = change("w", *(Fact(Figure(v), "lower") for v in (1, 2)))
    there = change("m", Fact(Figure(1)), Fact(Figure(2)), "on another machine")
    assert verdict_line(made(difference="none")) == "no difference"
    assert (
        verdict_line(made(difference="noise", checks=(failed,))) == "(slowdown); no difference beyond noise"
    )
    assert verdict_line(made(worse)) == "1 figure differs: 1 worse"
    assert verdict_line(made(there, worse)) == "2 figures differ: 1 worse, 1 on another machine"


def test_nothing_in_a_name_is_markup() -> None:
    fact = Fact(Figure(EVIL), headline=True, detail=EVIL)
    other = replace(fact, figure=Figure(EVIL * 2))
    side, check = Side(EVIL, EVIL, EVIL, EVIL, EVIL), Check(EVIL, "failed", EVIL)
    found = made(change(EVIL, fact, other), change("y", fact, None), checks=(check,), notes=(EVIL,))
    text = markdown(replace(found, a=side, b=side))
    assert "<script" not in text and "\x1b" not in text
    assert text.count("</details>") == text.count("<details>") == 1
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for t in tokens for child in t.children or ()]
    assert not [child for child in inline if child.type in ("html_inline", "link_open", "image")]
    assert {name: len(rows) for name, rows in parsed(text).items()} == {"gates": 2, "headlines": 3, "Part": 3}


def test_a_file_is_written_anew_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    diff = made(change("x", Fact(Figure(1)), Fact(Figure(2))))
    path = tmp_path / "diff.md"
    for _ in range(2):
        write_markdown(path, diff)
        assert path.read_text(encoding="utf-8") == markdown(diff)
    path.write_text("")
    write_markdown(path, diff)
    path.write_text("# Mine\n")
    with pytest.raises(InputError, match="is there already and is no comparison of nbl-export"):
        write_markdown(path, diff)
    assert path.read_text() == "# Mine\n"
    with pytest.raises(InputError, match="name a file in a folder that is there"):
        write_markdown(tmp_path, diff)
    with pytest.raises(InputError, match="name a file in a folder that is there"):
        write_markdown(tmp_path / "x" / "diff.md", diff)
    assert [p.name for p in tmp_path.iterdir()] == ["diff.md"]
