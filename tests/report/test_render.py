"""Markdown, HTML and JUnit: everything is in them, whatever the texts hold."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from junitparser import Failure, JUnitXml, Skipped

from nbl_export.files import printable
from nbl_export.records import Check, from_json
from nbl_export.report.drawing import Table
from nbl_export.report.plots import PLOTS, report_plots
from nbl_export.report.render import markdown, numeric_columns, page, write_junit, write_report
from nbl_export.report.schema import Report, load_report
from nbl_export.report.tables import report_tables, verdicts_table

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


def test_a_long_table_is_folded(report: Report) -> None:
    before = replace(report.graph.before, ops={f"Op{i}": i + 1 for i in range(30)})
    text = markdown(replace(report, graph=replace(report.graph, before=before)))
    folded = text.split("<details>\n<summary>")[1].split("</details>")[0]
    assert text.count("<details>") == text.count("</details>") == 1
    assert re.match(r"\d+ rows</summary>\n\n\|", folded) and "| Op29 | 30 | 0 |" in folded
    assert "<details>" not in markdown(report)


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
    again = load_report(tmp_path / "report.json")
    assert list(tables(markdown(again))) == TITLES
    assert str(bad) in markdown(again) and str(bad) in page(again, report_plots(again))


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


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/models/stories260K", "nbl-export-stories260K"),
        ("../Llama-3.1-8B/", "nbl-export-Llama-3_1-8B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct.Q4_1.gguf", "nbl-export-SmolLM2-135M-Instruct_Q4_1_gguf"),
        ("C:\\models\\a b", "nbl-export-C_models_a_b"),
        ("\x1b[2J\x00", "nbl-export-_2J"),
        (".", "nbl-export"),
        ("模型", "nbl-export-模型"),
    ],
)
def test_a_class_of_junit_is_no_path_and_no_package(
    report: Report, tmp_path: Path, source: str, name: str
) -> None:
    write_junit(
        tmp_path / "junit.xml", "nbl-export", replace(report, model=replace(report.model, source=source))
    )
    (suite,) = list(JUnitXml.fromfile(str(tmp_path / "junit.xml")))
    assert {case.classname for case in suite} == {name}
    assert not re.search(r"[./\\\s]", name)
    # Where the model lies is a property of the suite, before its cases, as the schema of JUnit has it.
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [one.tag for one in root[0]][:2] == ["properties", "testcase"]
    (model,) = suite.properties()
    assert (model.name, model.value) == ("model", printable(source))


def test_junit_has_the_time_of_a_check_where_it_is_known(report: Report, tmp_path: Path) -> None:
    checks = (
        Check("timed", "passed", "", 2.0625),
        Check("failed", "failed", "", 1.5),
        Check("untimed", "passed", ""),
        Check("odd", "passed", "", float("nan")),
    )
    write_junit(tmp_path / "junit.xml", "nbl-export", replace(report, checks=checks))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    times = {case.get("name"): case.get("time") for case in root.iter("testcase")}
    assert times == {"timed": "2.062", "failed": "1.5", "untimed": None, "odd": None}
    suite = root.find("testsuite")
    assert suite is not None and float(str(suite.get("time"))) == pytest.approx(3.562)


def test_markdown_shows_the_plots_that_were_drawn(full: Report, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.*)\n\n!\[([^\]]+)\]\((.*)\)\n\n\|", text, re.M)
    assert [(title.split(":")[0], path) for title, _, path in found] == [
        ("Loss and speed by K", "plots/k-curve.png"),
        ("Speed on ONNX Runtime, batch 1", "plots/speed.png"),
        ("Speed on A GPU, batch 1", "plots/engines.png"),
        ("Layers by cca", "plots/layers.png"),
    ]
    assert all((tmp_path / path).is_file() for _, _, path in found)
    # That of a bench is drawn in tests/test_bench.py, from one that was run.
    assert {Path(path).stem for _, _, path in found} == set(PLOTS)
    assert "![" not in markdown(full)
    tables(text)


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


def test_every_table_is_on_the_page_in_full(full: Report) -> None:
    reader = read(full)
    shown = [verdicts_table(full.checks), *report_tables(full)]
    assert list(reader.tables) == [t.title for t in shown]
    assert "Loss and speed by K" in reader.tables
    for table in shown:
        rows = [list(table.columns), *(list(row) for row in table.rows)]
        assert reader.tables[table.title] == [[cell.strip() for cell in row] for row in rows]


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


@pytest.mark.parametrize("verdict", ["PASS", "FAIL"])
def test_the_verdict_is_a_word_and_a_colour(full: Report, verdict: str) -> None:
    checks = [Check("good", "passed", "fine"), Check("left out", "skipped", "--no-speed")]
    if verdict == "FAIL":
        checks.append(Check("bad", "failed", "why"))
    reader = read(replace(full, checks=checks, divergence="layer 7" if verdict == "FAIL" else None))
    strong = reader.attributes("strong")
    assert strong[0] == {"class": f"status {'passed' if verdict == 'PASS' else 'failed'}"}
    assert reader.text().startswith(f"{verdict}: stories")
    decided = "bad" if verdict == "FAIL" else "good"
    assert f"{verdict} ({decided}); perplexity × " in reader.text()
    assert "no bound asked; skipped: left out." in reader.text()
    assert ("Where parity is lost: layer 7" in reader.text()) == (verdict == "FAIL")
    marks = [a["class"] for a in reader.attributes("span") if (a.get("class") or "").startswith("status")]
    assert marks == [f"status {c.status}" for c in checks]


def test_sections_that_were_not_run_are_left_out(report: Report) -> None:
    bare = replace(report, method_loss=None, speed=None, parity=None, notes=[])
    assert list(tables(markdown(bare))) == ["Checks", "Graph", "Layers by cca"]
    reader = Reader(page(bare, {}))
    assert [title for _, title in reader.headings[1:]] == [
        "Checks",
        "Graph",
        "Layers by cca",
        "How it was made",
    ]
    assert not reader.attributes("img") and "Notes" not in reader.text()


def test_figures_are_set_flush_right() -> None:
    rows = (
        (
            "a",
            "1,280",
            "-40.0%",
            "text",
            "± 0.1",
            "1.06×",
            "",
            "1 more",
            "12.0 MiB",
            "=",
            "0, 5-7",
            "nan",
            "1.0 ± 0.1",
        ),
        ("3", "768", "=", "1", "", "1.02–1.07 not resolved", "", "2", "0.1 MiB", "+3%", "2", "1.2e-5", ""),
    )
    table = Table("t", tuple("abcdefghijklm"), rows)
    assert numeric_columns(table) == {1, 2, 4, 5, 6, 8, 9, 11, 12}
    assert numeric_columns(Table("t", ("a", "b"), ())) == set()
