"""The comparison as tables and as Markdown, which a parser of GitHub's dialect reads back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.report.diff.compare import compare
from nbl_export.report.diff.drawing import (
    headline_table,
    markdown,
    tables,
    unchanged,
    verdict_line,
    write_markdown,
)
from nbl_export.report.diff.values import Change, Diff, Fact, Figure, Side, change, diff_of, section
from nbl_export.settings import DiffBounds

EVIL = "</details><script>alert(1)</script>|`[x](javascript:y)\n| a |\x1b[2J# **b**"


@pytest.fixture
def diff(stories_out: Path, stories_three: Path) -> Diff:
    return compare(stories_out, stories_three, DiffBounds(max_ppl_increase=1.1))


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


def test_verdict_and_headlines_come_first(diff: Diff) -> None:
    text = markdown(diff)
    lines = text.splitlines()
    assert lines[0] == "# nbl-export diff: FAIL"
    assert lines[2].startswith("**FAIL** (perplexity increase); ")
    assert lines[4].startswith("- A: ") and lines[5].startswith("- B: ")
    found = parsed(text)
    assert list(found)[:2] == ["gates", "headlines"]
    assert found["gates"][1][:2] == ["checks", "passed"] and found["gates"][2][:2] == [
        "perplexity increase",
        "failed",
    ]
    assert found["headlines"][1] == ["linear layers", "2 of 5: 2, 3", "3 of 5: 2-4", "changed", "added 4"]
    assert text.index("perplexity ratio") < text.index("<details>")


def test_every_section_that_differs_is_folded(diff: Diff) -> None:
    found = parsed(markdown(diff))
    for table in tables(diff):
        rows = [list(table.columns), *(list(row) for row in table.rows)]
        assert found[table.title] == [[cell.strip() for cell in row] for row in rows], table.title
    assert {"Graph", "Graph file", "Method loss", "Model and settings"} <= set(found)
    assert "Unmodified graph" not in found and "Unmodified graph" in unchanged(diff)
    assert "The same in both: " in markdown(diff)


def test_figures_are_written_in_their_units(diff: Diff) -> None:
    rows = {row[0]: row for row in headline_table(diff).rows}
    assert re.fullmatch(r"\d\.\d{4} ± \d\.\d{4}", rows["perplexity ratio"][1])
    assert re.fullmatch(r"\+\d\d\.\d%, worse", rows["perplexity ratio"][3])
    assert rows["size on disk"][1] == "1.0 MiB" and rows["KV cache, bytes per token"][1:4] == (
        "768",
        "512",
        "-33.3%, better",
    )


def made(*changes: Change, checks: tuple[Check, ...] = (), **more: object) -> Diff:
    part = replace(section("Part", {}, {}, notes=("a note",)), changes=changes)
    found = diff_of("report", (Side("a"), Side("b")), (part,), checks, DiffBounds())
    return replace(found, **more)  # type: ignore[arg-type]


def speedup(value: float, least: float, most: float) -> Fact:
    return Fact(Figure(value, least=least, most=most), "higher", "times", True, "5 ms")


def test_intervals_and_times() -> None:
    a, b = speedup(1.2, 1.1, 1.3), speedup(1.5, 1.4, 1.6)
    (row,) = headline_table(made(change("x", a, b))).rows
    assert row == ("x", "1.20× (1.10 to 1.30)", "1.50× (1.40 to 1.60)", "+25.0%, better", "5 ms")
    (row,) = headline_table(made(change("x", a, b)), brief=True).rows
    assert len(row) == 4
    unknown = speedup(1.5, float("-inf"), float("inf"))
    assert headline_table(made(change("x", a, unknown))).rows[0][2:4] == ("1.50×", "+25.0%, of unknown noise")
    assert headline_table(made(change("x", a, None))).rows[0][2:4] == ("none", "only in A")
    assert headline_table(made(change("x", a, a))).rows[0][3] == "="


def test_what_differs_is_not_written_alike() -> None:
    def row(a: float, b: float, unit: str) -> tuple[str, ...]:
        return headline_table(
            made(change("x", *(Fact(Figure(v), unit=unit, headline=True) for v in (a, b))))
        ).rows[0]

    assert row(1_048_576, 1_048_577, "bytes")[1:3] == ("1,048,576", "1,048,577")
    assert row(1.00001, 1.00002, "loss")[1:3] == ("1.00001", "1.00002")
    assert row(1.000012345678, 1.000012345999, "loss")[1:3] == ("1.0000123457", "1.000012346")
    assert row(2e-5, 4e-2, "error")[3] == "× 2,000" and row(1.0, 9.0, "")[3] == "+800.0%"
    assert row(0.0, 1.0, "loss")[1:4] == ("0.0000", "1.0000", "changed")
    assert row(float("nan"), 1.0, "loss")[1:3] == ("nan", "1.0000")


def test_a_terminal_shows_what_is_more_than_noise() -> None:
    noise = change("n", *(Fact(Figure(v, se=1.0), unit="loss") for v in (0.0, 0.1)))
    other = change("o", *(Fact(Figure(v)) for v in (1, 2)))
    (table,) = tables(made(noise, other), brief=True)
    assert [row[0] for row in table.rows] == ["o"] and table.note == "a note 1 more within noise."
    (table,) = tables(made(noise, other))
    assert [row[0] for row in table.rows] == ["n", "o"] and table.note == "a note"


def test_the_verdict_in_words() -> None:
    passed, failed = Check("checks", "passed", ""), Check("slowdown", "failed", "")
    same = change("s", Fact(Figure(1)), Fact(Figure(1)))
    noise = change("n", *(Fact(Figure(v, se=1.0)) for v in (0.0, 0.1)))
    worse = change("w", *(Fact(Figure(v), "lower") for v in (1, 2)))
    there = change("m", Fact(Figure(1)), Fact(Figure(2)), "on another machine")
    assert verdict_line(made(same, checks=(passed,))) == "(checks); no difference"
    assert verdict_line(made(noise, checks=(passed, failed))) == "(slowdown); no difference beyond noise"
    assert verdict_line(made(worse, noise)) == "1 figure differs: 1 worse"
    assert verdict_line(made(there, worse)) == "2 figures differ: 1 worse, 1 on another machine"
    assert markdown(made(same)).startswith("# nbl-export diff: no gate\n\nno difference.\n")
    assert markdown(made(same, checks=(passed,))).startswith(
        "# nbl-export diff: PASS\n\n**PASS** (checks); no diff"
    )


def test_nothing_in_a_name_is_markup() -> None:
    fact = Fact(Figure(EVIL), headline=True, detail=EVIL)
    other = replace(fact, figure=Figure(EVIL * 2))
    check = Check(EVIL, "failed", EVIL)
    side = Side(EVIL, EVIL, EVIL, EVIL, EVIL)
    found = made(
        change(EVIL, fact, other), change("y", fact, None), checks=(check,), a=side, b=side, notes=(EVIL,)
    )
    part = replace(found.sections[0], notes=(EVIL,))
    same = section(EVIL, {"x": fact}, {"x": fact})
    text = markdown(replace(found, sections=(part, same)))
    assert "<script" not in text and "\x1b" not in text
    assert text.count("</details>") == text.count("<details>") == 1
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    blocks = [t.content for t in tokens if t.type == "html_block"]
    assert [b.strip() for b in blocks] == ["<details>\n<summary>Part (2)</summary>", "</details>"]
    inline = [child for t in tokens for child in t.children or ()]
    assert not [child for child in inline if child.type in ("html_inline", "link_open", "image")]
    assert {name: len(rows) for name, rows in parsed(text).items()} == {"gates": 2, "headlines": 4, "Part": 3}
    assert next(t.content for t in tokens if t.type == "inline") == "nbl-export diff: FAIL"
    assert len([t for t in tokens if t.type == "heading_open"]) == 1


def test_a_file_is_written_anew_and_nothing_else_is_overwritten(diff: Diff, tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match="is a folder: name a file"):
        write_markdown(tmp_path, diff)
    with pytest.raises(InputError, match="there is no folder"):
        write_markdown(tmp_path / "x" / "diff.md", diff)
    assert [p.name for p in tmp_path.iterdir()] == ["diff.md"]
