"""What the command line draws: results on stdout, progress on stderr, and the verdict with where to look next."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.cli import terminal
from nbl_export.cli.terminal import TerminalListener, show_diagnosis, show_report, show_tables
from nbl_export.evaluate.results import Means
from nbl_export.models.source import ModelIdentity
from nbl_export.records import Check
from nbl_export.report.drawing import Table
from nbl_export.report.evaluation import Evaluation
from nbl_export.report.schema import Report, environment, load_report
from nbl_export.settings import EvalSettings


@pytest.fixture
def report(stories_out: Path) -> Report:
    return load_report(stories_out / "report" / "report.json")


TABLE = Table(
    "A title",
    ("", "n", "result"),
    (("first [row]", "1", "passed"), ("second", "1,234", "failed"), ("third", "5", "skipped")),
    "A note.",
)


def test_a_table_has_its_title_its_note_and_every_cell(screen: Any) -> None:
    text = screen("out")
    show_tables([TABLE, replace(TABLE, title="Another", note="")])
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert lines[0] == "A title" and lines.count("A note.") == 1 and "Another" in lines
    # What looks like markup is text. Figures stand flush right.
    assert "first [row]      1   passed" in lines and "second       1,234   failed" in lines
    assert text.getvalue().count("1,234") == 2


def test_a_report_ends_with_its_verdict_and_where_to_look(screen: Any, report: Report) -> None:
    text = screen("out", width=160)
    show_report(report, Path("out"))
    shown = text.getvalue().splitlines()
    verdict = next(line for line in shown if line.startswith("PASS"))
    assert re.match(r"PASS  \(graph rewrite, parity\); perplexity × \d\.\d{3}, KL .* no bound asked", verdict)
    said = shown[shown.index(verdict) + 1].strip()
    assert said == "2 of 5 attention layers of stories260K are now linear: layers 2, 3"
    assert shown[-1].split() == ["model", "out/model.onnx", "report", "out/report/report.html"]
    titles = [line for line in shown if line.rstrip() in ("Graph", "Checks")]
    assert [t.strip() for t in titles] == ["Graph", "Checks"], "the verdicts come last"
    assert "Layers by cca" not in text.getvalue()


IDENTITY = ModelIdentity("a/model", "folder", None, "0" * 64)


def evaluation(*checks: Check) -> Evaluation:
    return Evaluation("now", "1.0", IDENTITY, environment(), EvalSettings(), {}, checks, (), (), (), Means())


def test_what_looks_like_markup_or_is_obeyed_is_text_everywhere(screen: Any) -> None:
    err, out = screen("err", 120, True), screen("out", 120)
    listener = TerminalListener()
    with listener.task("a[/b]\x1b[2J", 1, "rows") as task:
        task.advance(1)
    listener.note("x[/b]\x07\u202e")
    terminal.say("y[/b]\x9b2J")
    evil = replace(TABLE, title="[/b]\x1b", columns=("[/c]", "\x07", "d"), note="\x1b]0;t\x07 [/n]")
    show_tables([evil])
    assert "a[/b]�[2J" in err.getvalue() and "x[/b]��" in err.getvalue()
    assert all(text in out.getvalue() for text in ("y[/b]�2J", "[/b]�", "[/c]", "�]0;t� [/n]"))
    assert not any(c in err.getvalue() + out.getvalue() for c in "\x07\x9b\u202e")


def test_a_diagnosis_ends_with_whether_the_main_job_runs(screen: Any) -> None:
    from nbl_export.doctor import Diagnosis
    from tests.test_doctor import MISSING, parts

    machine = {"Python": "3.11"}
    found = Diagnosis("0.1", "/clone", machine, parts(tensorrt=MISSING), (), ("A long problem. " * 20,))
    text = screen("out", width=80)
    show_diagnosis(found)
    lines = text.getvalue().splitlines()
    assert lines[-1] == "The main job runs here." and lines[0].startswith("nbl-export 0.1 from")
    line = next(one.pip for one in found.parts if one.package == "tensorrt")
    assert f"    {line}" in lines, "a line that can be copied is not broken"
    assert lines[-2].count("A long problem.") == 20
    show_diagnosis(replace(found, lacking=("torch is\x1b[31m missing.",)))
    assert text.getvalue().splitlines()[-2:] == [
        "torch is\N{REPLACEMENT CHARACTER}[31m missing.",
        "The main job does not run here.",
    ]
