"""What the command line draws: results on stdout, progress on stderr, and the verdict with where to look next."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nbl_export.blocks import Mlp
from nbl_export.checks import Check
from nbl_export.cli import terminal
from nbl_export.cli.terminal import TerminalListener, show_diagnosis, show_report, show_tables
from nbl_export.errors import InputError
from nbl_export.evaluate.results import Means
from nbl_export.models.source import ModelIdentity
from nbl_export.report.bench import BenchReport
from nbl_export.report.drawing import Table
from nbl_export.report.environment import environment
from nbl_export.report.evaluation import Evaluation
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import EvalSettings
from nbl_export.verify.speed.values import CandidateInfo, CellResult, Machine, Result, Speed, Timing
from tests.engine.conftest import manifest_by_hand

CONSOLES = {"out": "_out", "err": "_err"}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StringIO]:
    """Called with a stream's name and a width: what is drawn on it from then on, with colours if asked."""

    def watch(stream: str, width: int = 80, colours: bool = False) -> StringIO:
        text = StringIO()
        console = Console(
            file=text, width=width, highlight=False, force_terminal=colours, legacy_windows=False, _environ={}
        )
        monkeypatch.setattr(terminal, CONSOLES[stream], console)
        return text

    return watch


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


def test_each_problem_has_a_line(screen: Any) -> None:
    text = screen("out")
    show_tables([replace(TABLE, problems=("`a` does not fit.", "b\nc does not."))])
    assert text.getvalue().splitlines()[-3:] == [
        "`a` does not fit.",
        "b\N{REPLACEMENT CHARACTER}c does not.",
        "",
    ]


def test_results_are_coloured_by_their_word(screen: Any) -> None:
    text = screen("out", colours=True)
    show_tables([TABLE])
    shown = text.getvalue()
    for word, code in (("passed", "32"), ("failed", "1;31"), ("skipped", "33")):
        assert re.search(rf"\x1b\[{code}m *{word}", shown), word
    assert not re.search(r"\x1b\[[\d;]*m *1,234", shown)


def test_a_report_ends_with_its_verdict_and_where_to_look(screen: Any, report: Report) -> None:
    text = screen("out", width=160)
    show_report(report, Path("out"))
    shown = text.getvalue().splitlines()
    verdict = next(line for line in shown if line.startswith("PASS"))
    assert re.match(r"PASS  \(graph rewrite, parity\); perplexity × \d\.\d{3}, KL .* no bound asked", verdict)
    said = shown[shown.index(verdict) + 1].strip()
    assert said == "2 of 5 attention layers of stories260K are now linear: 2, 3"
    assert shown[-1].split() == ["model", "out/model.onnx", "report", "out/report/report.html"]
    titles = [line for line in shown if line.rstrip() in ("Graph", "Checks")]
    assert [t.strip() for t in titles] == ["Graph", "Checks"], "the verdicts come last"
    assert "Layers by cca" not in text.getvalue()


def test_a_failed_report_says_where_parity_is_lost(screen: Any, report: Report) -> None:
    text = screen("out", width=160)
    selection = replace(report.selection, layers=())
    checks = (*report.checks, Check("parity", "failed", "far"))
    show_report(
        replace(report, selection=selection, checks=checks, divergence="layer 2 is the first"), Path("out")
    )
    shown = text.getvalue()
    assert "FAIL  (parity); perplexity × " in shown and "PASS" not in shown
    assert "0 of 5 attention layers of stories260K are now linear\n" in shown
    assert "layer 2 is the first" in shown


def test_a_whole_report_fits_eighty_columns(screen: Any, report: Report) -> None:
    text = screen("out", width=80)
    name = "m" * 20  # a model's name is not broken by us
    show_report(replace(report, model=replace(report.model, source=name)), Path("out"))
    assert max(map(len, text.getvalue().splitlines())) <= 80
    speed = report.speed
    assert speed is not None
    for heading in ("tokens/s", "over own base", "perplexity ratio"):
        words = heading.split()
        assert all(word in text.getvalue() for word in words), heading


IDENTITY = ModelIdentity("a/model", "folder", None, "0" * 64)


def evaluation(*checks: Check) -> Evaluation:
    return Evaluation("now", "1.0", IDENTITY, environment(), EvalSettings(), {}, checks, (), (), (), Means())


def test_an_evaluation_has_a_verdict_only_with_a_gate(screen: Any) -> None:
    for checks, verdict in (
        ((), None),
        ((Check("mean recovery", "passed", "fine"),), "PASS"),
        ((Check("mean recovery", "failed", "low"),), "FAIL"),
        ((Check("mean recovery", "skipped", "guessing"),), "FAIL"),
    ):
        text = screen("out")
        terminal.show_evaluation(evaluation(*checks), Path("out"))
        lines = [line.strip() for line in text.getvalue().splitlines()]
        assert [line for line in lines if line in ("PASS", "FAIL")] == ([verdict] if verdict else [])
        assert lines[-1] == "evaluation out/report/eval.md"


def test_a_bench_shows_its_notes_and_what_was_not_timed(screen: Any) -> None:
    text = screen("out", width=120)
    cell = CellResult(
        "decode", 1, 64, (Result("base", Timing(2.0, 1.9, 2.1), 7, 500.0),), {"eager": "no memory"}
    )
    speed = Speed(Machine("CPU", 2), 7, (CandidateInfo("base"),), (cell,))
    checks = (Check("nowhere slower", "failed", "decode 64"),)
    value = BenchReport("now", "1.0", IDENTITY, environment(), {}, {}, checks, ("left out: 4,096",), speed)
    terminal.show_bench(value, Path("out"))
    lines = [line.strip() for line in text.getvalue().splitlines()]
    assert (
        "Bench" in lines
        and lines[-2:] == ["left out: 4,096", "bench out/report/bench.md"]
        and "FAIL" in lines
    )
    assert "eager in decode 64 (no memory)" in " ".join(lines)


def test_engines_and_graphs_are_shown_as_tables(screen: Any, report: Report) -> None:
    class Built:
        manifest = manifest_by_hand()

    text = screen("out", width=120)
    terminal.show_engines([Built()])  # type: ignore[list-item]
    assert text.getvalue().startswith("Engines: tensorrt-rtx 1.7.1.116, fp16, static cache")
    text = screen("out")
    terminal.show_rewrite(report.graph)  # type: ignore[arg-type]
    row = next(line for line in text.getvalue().splitlines() if line.startswith("KV pairs"))
    assert row.split()[-3:] == ["5", "3", "-40.0%"]


# progress -----------------------------------------------------------------------------------------


def test_notes_are_not_results(screen: Any) -> None:
    out, err = screen("out"), screen("err")
    terminal.say("a [result]")
    TerminalListener().note("a [note]")
    assert (out.getvalue(), err.getvalue()) == ("a [result]\n", "· a [note]\n")


def test_a_task_is_a_bar_that_counts(screen: Any) -> None:
    out, err = screen("out"), screen("err", width=100)
    with TerminalListener().task("Calibrating", 65_536, "tokens", 1_000) as task:
        task.advance(20_000)
        task.advance(44_536)
    (line,) = [line for line in err.getvalue().splitlines() if line.strip()]
    assert "Calibrating" in line and "65.5k/65.5k tokens" in line and "in 0:00:0" in line
    assert out.getvalue() == ""


def test_a_task_that_fails_shows_how_far_it_came(screen: Any) -> None:
    err = screen("err", width=100)
    with pytest.raises(ZeroDivisionError), TerminalListener().task("Writing", 8, "MiB") as task:
        task.advance(3)
        raise ZeroDivisionError
    assert "3/8 MiB" in err.getvalue() and "eta" in err.getvalue()


def test_a_task_of_parts_says_which_it_is_at_within_eighty_columns(screen: Any) -> None:
    err = screen("err", width=80, colours=True)
    with TerminalListener().task("Calibrating layer", 5_242_880, "tokens") as task:
        for layer in range(80):
            task.part(layer + 1, 80)
            task.advance(65_536)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", err.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert "Calibrating layer 80/80" in lines[-1] and "5.24M/5.24M tokens" in lines[-1]
    # One line that is drawn over itself, never a second one.
    assert all(len(line.rstrip()) <= 80 and "Calibrating layer" in line for line in lines)
    assert err.getvalue().count("\n") <= 1


def test_a_long_title_leaves_room_for_the_part(screen: Any) -> None:
    err = screen("err", width=100)
    with TerminalListener().task("A title that is longer than its column", 2, "rows") as task:
        task.part(1, 1)
        task.advance(2)
    assert "A title that is lon 1/1" in err.getvalue()


def test_a_log_gets_lines_whether_a_task_moves_or_not(screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar would say nothing before it ends, after hours."""
    monkeypatch.setattr(terminal, "_LINES", 0.05)
    err = screen("err", width=80)
    with TerminalListener().task("Calibrating layer", 40_000, "tokens") as task:
        for layer in range(4):
            task.part(layer + 1, 4)
            task.advance(10_000 if layer < 3 else 0)
        time.sleep(0.4)
        task.advance(10_000)
    lines = [line.rstrip() for line in err.getvalue().splitlines() if line.strip()]
    assert len(lines) >= 3, "several while it stood still, and the bar at the end"
    for line in lines[1:-1]:
        assert re.match(r"· Calibrating layer 4/4: 30\.0k/40\.0k tokens(, [\d.,]+k?M?/s)?, eta ", line), lines
    assert all(len(line) <= 80 for line in lines)
    terminal_only = screen("err", width=80, colours=True)
    with TerminalListener().task("Calibrating layer", 4, "tokens") as task:
        time.sleep(0.2)
        task.advance(4)
    assert "·" not in terminal_only.getvalue()


def test_the_innermost_task_is_the_one_that_is_named(screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_LINES", 0.05)
    err, listener = screen("err", width=80), TerminalListener()
    with listener.task("Outer", 2, "layers"), listener.task("Inner", 3, "rows"):
        time.sleep(0.3)
    said = [line for line in err.getvalue().splitlines() if line.startswith("·")]
    assert said and all(line.startswith("· Inner: 0/3 rows") for line in said)


# how a command answers ---------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[None]:
    yield
    terminal.set_up(False, False, None)


@pytest.mark.usefixtures("answering")
def test_an_answer_in_json_is_all_there_is_on_stdout(
    screen: Any, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    screen("out")
    screen("err")
    terminal.set_up(True, False, None)
    show_report(report, Path("out"))
    assert json.loads(capsys.readouterr().out) == report.as_json()
    terminal.say("a line")
    show_tables([TABLE])
    terminal.finish("export", "Exported.", graph=Path("a/model.onnx"), layers=(1, Mlp(2)), kl=float("inf"))
    text = capsys.readouterr().out
    assert json.loads(text) == {
        "schema": "nbl-export/answer/1",
        "command": "export",
        "graph": "a/model.onnx",
        "layers": [1, "2.mlp"],
        "kl": "inf",
    }
    terminal.finish_tables("inspect", [TABLE])
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["title"] == "A title" and table["rows"][1] == ["second", "1,234", "failed"]


@pytest.mark.usefixtures("answering")
def test_quiet_leaves_out_progress_and_notes_alone(screen: Any) -> None:
    out, err = screen("out"), screen("err")
    terminal.set_up(False, True, None)
    with TerminalListener().task("Calibrating", 1, "rows") as task:
        task.advance(1)
    TerminalListener().note("a note")
    terminal.say("a result")
    assert (out.getvalue(), err.getvalue()) == ("a result\n", "")


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize(("as_json", "quiet"), [(False, False), (True, True)])
def test_a_log_file_has_all_that_is_said(
    screen: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool, quiet: bool
) -> None:
    monkeypatch.setattr(terminal, "_LINES", 0.05)
    screen("out")
    screen("err", colours=True)
    path = tmp_path / "a.log"
    path.write_text("of before\n")
    terminal.set_up(as_json, quiet, path)
    with TerminalListener().task("Calibrating", 2, "rows") as task:
        time.sleep(0.2)
        task.advance(2)
    TerminalListener().note("a note \x1b[2J")
    show_tables([TABLE])
    terminal.finish("export", "Exported.", out=tmp_path)
    lines = path.read_text().splitlines()
    stamped = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines]
    assert lines[0] == "of before" and stamped[-1] == "Exported." and "· a note �[2J" in stamped
    assert stamped[1].startswith("Calibrating: 0/2 rows, eta ")
    assert any(line.startswith("Calibrating: 2/2 rows") for line in stamped)
    assert any(line.startswith("second") for line in lines)
    assert "\x1b" not in path.read_text()


@pytest.mark.usefixtures("answering")
def test_a_log_file_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file or directory opening --log-file .*none/a\.log"):
        terminal.set_up(False, False, tmp_path / "none" / "a.log")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (9, "9"),
        (12.6, "13"),
        (9_999, "9,999"),
        (10_000, "10.0k"),
        (65_536, "65.5k"),
        (999_999, "1000.0k"),
        (5_242_880, "5.24M"),
    ],
)
def test_numbers_in_progress_are_short(number: float, text: str) -> None:
    assert terminal._short(number) == text


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


def test_a_task_within_another_is_a_bar_below_it(screen: Any) -> None:
    err = screen("err")
    listener = TerminalListener()
    for title in ("First", "Second"):
        with listener.task(title, 2, "layers") as outer:
            with listener.task(f"within {title}", 1, "model") as inner:
                inner.advance(1)
            outer.advance(2)
    words = [line.split("━")[0].split(None, 1)[1].strip() for line in err.getvalue().splitlines()]
    assert words == ["First", "within First", "Second", "within Second"]
    with pytest.raises(ValueError, match="x"), listener.task("Third", 1, "layers"):
        raise ValueError("x")
    with listener.task("Fourth", 1, "layers"):
        pass
    assert "Fourth" in err.getvalue()


def test_what_is_said_begins_a_line_where_a_second_signal_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StringIO()
    monkeypatch.setattr(terminal, "_err", Console(file=log, width=80))

    def interrupted(progress: Any) -> None:
        progress.live.stop()
        assert log.getvalue() and not log.getvalue().endswith("\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Progress, "stop", interrupted)
    with pytest.raises(KeyboardInterrupt), TerminalListener().task("Working", 2, "steps"):
        raise KeyboardInterrupt
    assert "Working" in log.getvalue() and log.getvalue().endswith("\n")


def test_a_diagnosis_ends_with_whether_the_main_job_runs(screen: Any) -> None:
    from nbl_export.doctor.diagnosis import Diagnosis
    from tests.doctor.made import MACHINE, parts

    found = Diagnosis("0.1.0", "/work/clone", MACHINE, parts(tensorrt=None), (), ("A long problem. " * 20,))
    text = screen("out", width=80)
    show_diagnosis(found)
    lines = text.getvalue().splitlines()
    assert lines[-1] == "The main job runs here." and lines[0].startswith("nbl-export 0.1.0 from /work/clone")
    line = next(one.pip for one in found.parts if one.package == "tensorrt")
    assert f"    {line}" in lines, "a line that can be copied is not broken"
    assert lines[-2].count("A long problem.") == 20
    table = lines[: next(n for n, shown in enumerate(lines) if shown.startswith("What is missing"))]
    assert max(map(len, table)) <= 80
    bad = replace(found, lacking=("torch is\x1b[31m missing.",))
    text = screen("out", width=80)
    show_diagnosis(bad)
    assert text.getvalue().splitlines()[-2:] == [
        "torch is\N{REPLACEMENT CHARACTER}[31m missing.",
        "The main job does not run here.",
    ]
