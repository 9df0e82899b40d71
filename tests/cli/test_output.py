"""Results on stdout, progress on stderr, everything in a log file, and answers in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.blocks import Mlp
from nbl_export.cli import bars, output, terminal
from nbl_export.cli.bars import TerminalListener
from nbl_export.cli.terminal import show_report, show_tables
from nbl_export.errors import InputError
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report, load_report

TABLE = Table(
    "A title", ("", "n", "result"), (("first", "1", "passed"), ("second", "1,234", "failed")), "A note."
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
    output.say("a line")
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
    terminal.finish_tables("inspect", [TABLE])
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["title"] == "A title" and table["rows"][1] == ["second", "1,234", "failed"]


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize(("as_json", "quiet"), [(False, False), (True, True)])
def test_a_log_file_has_all_that_is_said(
    screen: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool, quiet: bool
) -> None:
    monkeypatch.setattr(bars, "_LINES", 0)
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
