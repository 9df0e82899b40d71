"""Markdown, HTML and JUnit: everything is in them, whatever the texts hold."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from junitparser import Failure, JUnitXml, Skipped

from nbl_export.records import Check, from_json
from nbl_export.report.plots import report_plots
from nbl_export.report.render import markdown, page, write_report
from nbl_export.report.schema import Report

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
        Check("worse", "failed", "much worse"),
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

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Reads a page and refuses one whose elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        elif tag == "tr":
            self.tables.setdefault(self.headings[-1][1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.headings[-1][1]][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        elif {"td", "th"} & set(self.open):
            self.tables[self.headings[-1][1]][-1][-1] += data

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(report: Report) -> Reader:
    return Reader(page(report, report_plots(report)))


def test_plots_say_what_they_show_and_nothing_is_fetched(full: Report) -> None:
    text, plots = page(full, report_plots(full)), report_plots(full)
    reader = Reader(text)
    drawn = reader.attributes("img")
    assert [a["alt"] for a in drawn] == [plots[n].text for n in ("k-curve", "speed", "engines", "layers")]
    for picture in drawn:
        kind, _, data = str(picture["src"]).partition(",")
        assert kind == "data:image/svg+xml;base64" and b"<svg" in b64decode(data)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
    policy = [m["content"] for m in reader.attributes("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    defined = set(re.findall(r"--(\w+):", text))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= defined and "prefers-color-scheme: dark" in text


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
    reader = Reader(text)
    assert not {"script"} & {tag for tag, _ in reader.tags}
    assert all(str(a["src"]).startswith("data:") for a in reader.attributes("img"))
    assert not [a for _, a in reader.tags if any(name.startswith("on") for name in a)]
    assert "<script" not in text and "{{ 7 * 7 }}" in text
    # It is there to be read: title, head, check, note, operator, package, engine.
    assert reader.text().count("<script>alert(1)</script>") >= 10
    assert len(reader.attributes("title")) == 1 and len(reader.attributes("style")) == 1
    assert reader.tables["Checks"][1] == [NASTY, "failed", NASTY]
