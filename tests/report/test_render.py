"""Markdown, HTML and JUnit: everything is in them, whatever the texts hold."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass, replace
from html import unescape
from math import nan
from pathlib import Path
from typing import Any

import pytest
from junitparser import Failure, JUnitXml, Skipped
from matplotlib.container import ErrorbarContainer

from nbl_export.linearize.selection import Curve
from nbl_export.records import Check, from_json
from nbl_export.report.plots import report_plots
from nbl_export.report.render import markdown, page, write_report
from nbl_export.report.schema import Report, load_report

TITLES = [
    "Checks",
    "Graph",
    "Method loss: original against linearized, held-out text",
    "Speed on ONNX Runtime, batch 1",
    "Parity: linearized PyTorch against the rewritten graph",
    "Layers by cca",
]


FILES = ["report.json", "report.md", "report.html", "junit.xml", "plots/layers.png", "plots/speed.png"]


def cells(line: str) -> list[str]:
    """The cells of a GitHub table row: split at the pipes that no backslash escapes."""
    assert line.startswith("|") and line.endswith("|")
    return [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line[1:-1])]


def tables(text: str) -> dict[str, list[list[str]]]:
    """Title to rows, the heading first and the ruler left out; every row must be as wide as its heading."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("|"):
            found.setdefault(title, []).append(cells(line))
    for title, rows in found.items():
        assert set(rows.pop(1)) == {"---"}, title
        assert {len(row) for row in rows} == {len(rows[0])}, title
    assert found.pop("")  # the headline figures
    return found


def test_head_line_is_the_verdict(report: Report) -> None:
    assert markdown(report).startswith("# nbl-export report: PASS\n")
    failed = replace(report, checks=[*report.checks, Check("one more", "failed", "why")])
    assert markdown(failed).startswith("# nbl-export report: FAIL\n")
    assert "Where parity is lost" not in markdown(failed)
    text = markdown(replace(failed, divergence="layer 7 (attention) is the first"))
    assert "**Where parity is lost:** layer 7 (attention) is the first" in text
    assert list(tables(text)) == TITLES


@pytest.mark.parametrize("nasty", ["a | b", "||", "two\nlines", "| starts", "ends |", "max |Δlogit| | x"])
def test_pipes_and_line_ends_do_not_break_a_table(report: Report, nasty: str) -> None:
    checks = [Check(f"name {nasty}", "failed", f"detail {nasty}"), Check("last", "passed", "fine")]
    before = replace(report.graph.before, ops={**report.graph.before.ops, nasty: 3})
    graph = replace(report.graph, before=before)
    drawn = tables(markdown(replace(report, checks=checks, graph=graph)))
    one_line = nasty.replace("\n", " ")
    assert drawn["Checks"][1:] == [
        [f"name {one_line}".strip(), "failed", f"detail {one_line}".strip()],
        ["last", "passed", "fine"],
    ]
    assert [one_line.strip(), "3", "0"] in [row[:3] for row in drawn["Graph"]]


# files -------------------------------------------------------------------------------------------


def test_junit_counts(report: Report, tmp_path: Path) -> None:
    checks = [
        Check("good", "passed", "fine"),
        Check("bad", "failed", 'worse than <allowed> & "quoted"'),
        Check("worse", "failed", "much \x1b[2Jworse"),
        Check("left out", "skipped", "--no-speed"),
    ]
    paths = write_report(tmp_path / "report", replace(report, checks=checks))
    assert [str(p.relative_to(tmp_path / "report")) for p in paths] == FILES
    assert sorted(p for p in (tmp_path / "report").rglob("*") if p.is_file()) == sorted(paths)
    xml = JUnitXml.fromfile(str(tmp_path / "report" / "junit.xml"))
    assert (xml.tests, xml.failures, xml.skipped, xml.errors) == (4, 2, 1, 0)
    (suite,) = list(xml)
    cases = {case.name: case for case in suite}
    assert list(cases) == ["good", "bad", "worse", "left out"]
    assert cases["good"].is_passed and cases["good"].system_out == "fine"
    (failure,) = cases["bad"].result
    assert isinstance(failure, Failure) and failure.message == 'worse than <allowed> & "quoted"'
    (skipped,) = cases["left out"].result
    assert isinstance(skipped, Skipped) and skipped.message == "--no-speed"


# the page ----------------------------------------------------------------------------------------

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</style></title>&amp;{{ 7 * 7 }}"


def everywhere(value: Any, known: frozenset[str]) -> Any:
    """Every text of a report made hostile, but for the words that decide how it is drawn."""
    if isinstance(value, dict):
        return {k: v if k in known else everywhere(v, known) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, known) for v in value]
    number = value in ("nan", "inf", "-inf")  # as JSON has them
    return f"{NASTY}{value}" if isinstance(value, str) and not number else value


def test_texts_of_the_report_are_only_text(full: Report) -> None:
    known = frozenset({"criterion", "phase", "status"})
    raw = everywhere(json.loads(json.dumps(full.as_json())), known)
    fields = {k: v for k, v in raw.items() if k not in ("schema", "verdict")}
    checks = [Check(NASTY, "failed", NASTY), Check("b", "skipped", NASTY)]
    fields["model"]["kind"] = "folder"
    fields["graph"]["before"]["ops"][NASTY] = 1
    fields["environment"]["packages"] = {NASTY: NASTY}
    fields["selection"]["others"] = {NASTY: NASTY}
    hostile = from_json(Report, fields, "The report", "make it again")
    hostile = replace(hostile, checks=checks, notes=[NASTY], divergence=NASTY)
    text = page(hostile, report_plots(hostile))
    tags = re.findall(r"<(\w+)([^<>]*)>", text)  # whatever opens one
    kinds = [tag for tag, _ in tags]
    assert "script" not in kinds and kinds.count("title") == kinds.count("style") == 1
    assert all(' src="data:' in attributes for tag, attributes in tags if tag == "img")
    assert not [a for _, a in tags if re.search(r"""\son\w+\s*=""", re.sub(r'"[^"]*"', '""', a))]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert "<script" not in text and "{{ 7 * 7 }}" in text
    # It is there to be read: title, head, check, note, operator, package, engine.
    assert unescape(re.sub(r"<[^<>]*>", "", text)).count("<script>alert(1)</script>") >= 10


def line(container: Any) -> tuple[list[float], list[float]]:
    assert isinstance(container, ErrorbarContainer)
    x, y = container.lines[0].get_data()
    return list(x), list(y)


def whiskers(container: Any) -> list[tuple[float, float]]:
    """The ends of each error bar, low and high."""
    (collection,) = container.lines[2]
    return [(float(s[0][1]), float(s[1][1])) for s in collection.get_segments()]


def test_the_curve_is_the_report_s(full: Report, curve: Curve) -> None:
    by_k = sorted(curve.points, key=lambda p: p.k)
    ratio, kl, speed = report_plots(full)["k-curve"].draw().axes
    for key, axes in (("perplexity_ratio", ratio), ("kl", kl)):
        (drawn,) = axes.containers
        assert line(drawn) == ([1, 2, 3, 4], [getattr(p, key) for p in by_k])
        values = [(getattr(p, key), getattr(p, f"{key}_se")) for p in by_k]
        for ends, (value, se) in zip(whiskers(drawn), values, strict=True):
            assert ends == pytest.approx((value - se, value + se))
    prefill, decode = speed.containers
    assert line(prefill)[1] == [p.prefill_speedup for p in by_k]
    # The one that was not measured is left out, not drawn as 0.
    assert str(line(decode)[1]) == str([1.05, 1.1, nan, 1.2])
    for axes, bound in ((ratio, 1.2), (kl, 0.5), (speed, 1.07)):
        assert [bound, bound] in [list(ln.get_ydata()) for ln in axes.lines]
        assert [2, 2] in [list(ln.get_xdata()) for ln in axes.lines], "the K that was chosen"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("section", ["parity", "method_loss"])
def test_figures_that_are_no_numbers_are_drawn(
    report: Report, tmp_path: Path, section: str, bad: float
) -> None:
    """A broken model gives such figures; the report of it must still be written, read and drawn."""

    def broken(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(broken(v) for v in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: broken(getattr(value, f.name)) for f in fields(value)})
        return bad if isinstance(value, float) else value

    found = getattr(report, section)
    gates = {"gates": found.gates} if section == "parity" else {}
    changed = replace(report, **{section: replace(broken(found), **gates)})
    write_report(tmp_path, changed)
    # The standard has no NaN and no Infinity.
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    again = load_report(tmp_path / "report.json")
    assert list(tables(markdown(again))) == TITLES
    assert str(bad) in markdown(again) and str(bad) in page(again, report_plots(again))


def test_the_verdict_is_written_even_if_drawing_fails(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr("nbl_export.report.plots.Plot.file", fails)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, report)
    assert {p.name for p in tmp_path.iterdir()} >= {"report.json", "junit.xml"}
    assert not list(tmp_path.rglob(".*"))
