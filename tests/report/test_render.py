"""Markdown and JUnit: everything is in them, whatever the texts hold."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from junitparser import Failure, JUnitXml, Skipped

from nbl_export.checks import Check
from nbl_export.printable import printable
from nbl_export.report.page import page
from nbl_export.report.plots import PLOTS, report_plots
from nbl_export.report.render import markdown, write_junit, write_report
from nbl_export.report.schema import Report, load_report
from nbl_export.report.summary import headlines
from nbl_export.report.tables import checks_table, report_tables
from nbl_export.verify.loss.figures import MethodLoss

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


def test_markdown_has_every_table_in_full(report: Report) -> None:
    drawn = tables(markdown(report))
    assert list(drawn) == TITLES
    for table in (checks_table(report), *report_tables(report)):
        rows = [list(table.columns), *(list(r) for r in table.rows)]
        assert drawn[table.title] == [[c.strip() for c in row] for row in rows]
    assert len(drawn[TITLES[4]]) == 1 + 9
    assert len(drawn[TITLES[5]]) == 1 + 5


def test_markdown_figures_are_the_report_s(report: Report) -> None:
    drawn = {title: {row[0]: row[1:] for row in rows} for title, rows in tables(markdown(report)).items()}
    before, after = report.graph.before, report.graph.after
    assert drawn["Graph"]["KV pairs (layers with a cache)"] == ["5", "3", "-40.0%"]
    assert drawn["Graph"]["parameters"][:2] == [f"{before.parameters:,}", f"{after.parameters:,}"]
    # 4 KV heads of 8 float32, keys and values.
    assert drawn["Graph"]["KV cache, bytes per token"][:2] == ["1,280", "768"]
    loss = report.method_loss
    assert isinstance(loss, MethodLoss)
    assert drawn[TITLES[2]]["perplexity ratio"][0] == f"{loss.perplexity_ratio:.4f}"
    assert set(drawn[TITLES[3]]) == {"", "prefill 16", "decode 16"}
    assert {row[1] for row in tables(markdown(report))[TITLES[3]]} == {"candidate", "base", "linearized"}
    linear = {layer for layer, row in drawn[TITLES[5]].items() if row[1] == "linear"}
    assert linear == {"2", "3"}
    assert {row[0] for row in list(drawn[TITLES[5]].values())[1:]} == {"full"}


def test_head_line_is_the_verdict(report: Report) -> None:
    assert markdown(report).startswith("# nbl-export report: PASS\n")
    failed = replace(report, checks=[*report.checks, Check("one more", "failed", "why")])
    assert markdown(failed).startswith("# nbl-export report: FAIL\n")
    assert "Where parity is lost" not in markdown(failed)
    text = markdown(replace(failed, divergence="layer 7 (attention) is the first"))
    assert "**Where parity is lost:** layer 7 (attention) is the first" in text
    assert list(tables(text)) == TITLES


def test_headline_figures_come_first(report: Report) -> None:
    top = markdown(report).split("\n## ")[0]
    for one in headlines(report):
        assert f"| **{one.name}** | {one.value} |" in top, one.name


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


def test_sections_that_were_not_run_are_left_out(report: Report) -> None:
    short = replace(report, method_loss=None, speed=None, parity=None, notes=[])
    assert list(tables(markdown(short))) == ["Checks", "Graph", "Layers by cca"]
    assert "## Notes" not in markdown(short)


def test_notes_are_listed(report: Report) -> None:
    text = markdown(replace(report, notes=["first note", "second | note"]))
    assert "\n- first note\n- second | note\n" in text


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


def test_a_layer_that_was_not_proven_is_drawn(report: Report, tmp_path: Path) -> None:
    first, *others = report.graph.proofs
    proofs = (replace(first, input_error=float("inf")), *others)
    write_report(tmp_path, replace(report, graph=replace(report.graph, proofs=proofs)))
    rows = tables(markdown(load_report(tmp_path / "report.json")))["Layers by cca"]
    assert [row[-1] for row in rows if row[0] == "0"] == ["inf"]


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


def test_checks_of_a_run_say_how_long_they_took(stories_out: Path) -> None:
    report = load_report(stories_out / "report" / "report.json")
    seconds = {check.name: check.seconds for check in report.checks}
    assert seconds["graph rewrite"] == report.stage_seconds["rewrite"]
    for name in ("parity", "speed"):
        assert (seconds[name] or 0) > 0.01, name
    cases = {
        case.name: case.time
        for case in next(iter(JUnitXml.fromfile(str(stories_out / "report" / "junit.xml"))))
    }
    assert cases == {name: spent and round(spent, 3) for name, spent in seconds.items()}


def test_the_written_files_are_the_report(stories_out: Path, tmp_path: Path) -> None:
    report = load_report(stories_out / "report" / "report.json")
    write_report(tmp_path, report)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (stories_out / "report" / name).read_bytes(), name
    xml = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    skipped = sum(c.status == "skipped" for c in report.checks)
    assert (xml.tests, xml.failures, xml.skipped) == (len(report.checks), 0, skipped)


def test_markdown_shows_the_plots_that_were_drawn(full: Report, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.*)\n\n!\[([^\]]+)\]\((.*)\)\n\n\|", text, re.M)
    assert [(title.split(":")[0], path) for title, _, path in found] == [
        ("Loss and speed by K", "plots/k-curve.png"),
        ("Loss by speed, each way", "plots/frontier.png"),
        ("Speed on ONNX Runtime, batch 1", "plots/speed.png"),
        ("Speed on A GPU, batch 1", "plots/engines.png"),
        ("Layers by cca", "plots/layers.png"),
    ]
    assert all((tmp_path / path).is_file() for _, _, path in found)
    # That of a bench is drawn in tests/test_bench.py, from one that was run.
    assert {Path(path).stem for _, _, path in found} == set(PLOTS)
    assert "![" not in markdown(full)
    tables(text)


def test_a_plot_without_figures_any_more_is_removed(full: Report, report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    (tmp_path / "plots" / "mine.png").write_bytes(b"not ours")
    paths = write_report(tmp_path, replace(report, speed=None))
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"layers.png", "mine.png"}
    assert [p.name for p in paths if p.suffix == ".png"] == ["layers.png"]


def test_drawn_from_json_the_files_are_the_same(full: Report, tmp_path: Path) -> None:
    first = write_report(tmp_path / "a", full)
    second = write_report(tmp_path / "b", load_report(tmp_path / "a" / "report.json"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_the_verdict_is_written_even_if_drawing_fails(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr("nbl_export.report.plots.as_png", fails)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, report)
    assert {p.name for p in tmp_path.iterdir()} >= {"report.json", "junit.xml"}
    assert not list(tmp_path.rglob(".*"))
