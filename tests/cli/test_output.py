"""Results on stdout, progress on stderr, everything in a log file, and answers in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nbl_export.blocks import Mlp
from nbl_export.cli import output, terminal
from nbl_export.cli.output import TerminalListener, show_tables
from nbl_export.cli.terminal import show_report
from nbl_export.errors import InputError
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report, load_report
from tests.processes import nbl

CONSOLES = {"out": "OUT", "err": "ERR"}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StringIO]:
    """Called with a stream's name and a width: what is drawn on it from then on, with colours if asked."""

    def watch(stream: str, width: int = 80, colours: bool = False) -> StringIO:
        text = StringIO()
        console = Console(
            file=text, width=width, highlight=False, force_terminal=colours, legacy_windows=False, _environ={}
        )
        monkeypatch.setattr(output, CONSOLES[stream], console)
        return text

    return watch


# output ----------------------------------------------------------------------------------

TABLE = Table(
    "A title", ("", "n", "result"), (("first [row]", "1", "passed"), ("second", "1,234", "failed")), "A note."
)


@pytest.fixture
def report(stories_out: Path) -> Report:
    return load_report(stories_out / "report" / "report.json")


@pytest.fixture
def answering() -> Iterator[None]:
    yield
    output.set_up(False, False, None)


@pytest.mark.usefixtures("answering")
def test_an_answer_in_json_is_all_there_is_on_stdout(
    screen: Any, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    screen("out")
    screen("err")
    output.set_up(True, False, None)
    show_report(report, Path("out"))
    assert json.loads(capsys.readouterr().out) == report.as_json()
    show_tables([TABLE])
    output.finish("export", "Exported.", graph=Path("a/model.onnx"), layers=(1, Mlp(2)), kl=float("inf"))
    text = capsys.readouterr().out
    assert json.loads(text) == {
        "schema": "nbl-export/answer/1",
        "command": "export",
        "graph": "a/model.onnx",
        "layers": [1, "2.mlp"],
        "kl": "inf",
    }
    terminal.show("inspect", {"tables": [TABLE]}, [TABLE])
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["title"] == "A title" and table["rows"][1] == ["second", "1,234", "failed"]


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize(("as_json", "quiet"), [(False, False), (True, True)])
def test_a_log_file_has_all_that_is_said(
    screen: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool, quiet: bool
) -> None:
    monkeypatch.setattr(output, "_LINES", 0)
    screen("out")
    screen("err", colours=True)
    path = tmp_path / "a.log"
    path.write_text("of before\n")
    output.set_up(as_json, quiet, path)
    with TerminalListener().task("Calibrating", 2, "rows") as task:
        task.advance(1)
        task.advance(1)
    TerminalListener().note("a note \x1b[2J")
    show_tables([TABLE])
    output.finish("export", "Exported.", out=tmp_path)
    lines = path.read_text().splitlines()
    stamped = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines]
    assert lines[0] == "of before" and stamped[-1] == "Exported." and "· a note �[2J" in stamped
    assert stamped[1].startswith("Calibrating: 1/2 rows")
    assert any(line.startswith("Calibrating: 2/2 rows") for line in stamped)
    assert any(line.startswith("second") for line in lines)
    assert "\x1b" not in path.read_text()


@pytest.mark.usefixtures("answering")
def test_a_log_file_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file or directory opening --log-file .*none/a\.log"):
        output.set_up(False, False, tmp_path / "none" / "a.log")


# answers -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("answering")
def test_each_command_answers_with_one_object(stories_copy: Path) -> None:
    def answer(*words: object) -> Any:
        done = nbl(*words, "--json")
        assert done.code == 0
        return json.loads(done.out)

    found = answer("inspect", stories_copy / "model.onnx")
    assert [t["title"] for t in found["tables"]]
    assert (found["schema"], found["command"]) == (output.ANSWER, "inspect")
    found = answer("select", stories_copy, "--k", 1, "--criterion", "cca")
    assert found["k"] == len(found["layers"]) == 1 and found["fit"] == "lmmse"
    assert found["out"] == str(stories_copy)
    assert answer("rewrite", stories_copy)["graph"] == str(stories_copy / "model.onnx")
    report = answer("verify", stories_copy, "--no-quality", "--no-speed")
    assert report == json.loads((stories_copy / "report" / "report.json").read_text())
    assert answer("report", stories_copy)["schema"] == "nbl-export/report/2"


@pytest.mark.usefixtures("answering")
def test_an_error_is_an_object_too(tmp_path: Path) -> None:
    done = nbl("inspect", tmp_path / "nothing", "--json")
    found = json.loads(done.out)
    assert done.code == found["exit_code"] == 2 and found["schema"] == "nbl-export/error/1"
    assert done.err == f"error: {found['error']}\n" and "does not exist" in found["error"]
    assert "did you mean select" in json.loads(nbl("selct", "--json").out)["error"]


# bars ----------------------------------------------------------------------------------------------


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


def test_a_log_gets_lines_where_no_bar_is_drawn(screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar would say nothing before it ends, after hours."""
    monkeypatch.setattr(output, "_LINES", 0)
    err, on_terminal = screen("err", width=80), "·"
    with TerminalListener().task("Calibrating layer", 40_000, "tokens") as task:
        task.part(4, 4)
        task.advance(30_000)
        task.advance(0)  # nothing has changed
    assert err.getvalue().startswith("· Calibrating layer 4/4: 30.0k/40.0k tokens\n")
    assert err.getvalue().count("30.0k/40.0k") == 1
    terminal = screen("err", width=80, colours=True)
    with TerminalListener().task("Calibrating layer", 4, "tokens") as task:
        task.advance(4)
    assert on_terminal not in terminal.getvalue()


# terminal ------------------------------------------------------------------------------------------


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


def test_what_looks_like_markup_or_is_obeyed_is_text_everywhere(screen: Any) -> None:
    err, out = screen("err", 120, True), screen("out", 120)
    listener = TerminalListener()
    with listener.task("a[/b]\x1b[2J", 1, "rows") as task:
        task.advance(1)
    listener.note("x[/b]\x07\u202e")
    output.result(output.drawable("y[/b]\x9b2J"))
    evil = replace(TABLE, title="[/b]\x1b", columns=("[/c]", "\x07", "d"), note="\x1b]0;t\x07 [/n]")
    show_tables([evil])
    assert "a[/b]�[2J" in err.getvalue() and "x[/b]��" in err.getvalue()
    assert all(text in out.getvalue() for text in ("y[/b]�2J", "[/b]�", "[/c]", "�]0;t� [/n]"))
    assert not any(c in err.getvalue() + out.getvalue() for c in "\x07\x9b\u202e")
