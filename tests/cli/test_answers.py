"""`--json`, `--quiet` and `--log-file` of the commands themselves, on a real output folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export import ranks
from nbl_export.cli import output, terminal
from nbl_export.cli.main import _command

Asked = Callable[..., Any]


@pytest.fixture
def out(stories_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_out, tmp_path / "out", copy_function=shutil.copy2))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Asked]:
    """Called with the words of a command: its exit code, what is on stdout, and what is on stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nbl-export", *map(str, words)])
        code = _command()
        said = capsys.readouterr()
        return code, said.out, said.err

    yield call
    ranks.end()  # what `main` ends: a test of several processes in this one would find it begun
    terminal.set_up(False, False, None)


def test_each_command_answers_with_one_object(asked: Asked, out: Path) -> None:
    code, text, _ = asked("inspect", out / "model.onnx", "--json")
    assert code == 0 and [t["title"] for t in json.loads(text)["tables"]]
    assert json.loads(text)["schema"] == output.ANSWER and json.loads(text)["command"] == "inspect"

    code, text, _ = asked("select", out, "--k", 1, "--criterion", "cca", "--json")
    found = json.loads(text)
    assert code == 0 and found["k"] == len(found["layers"]) == 1 and found["fit"] == "lmmse"
    assert found["out"] == str(out)

    code, text, _ = asked("rewrite", out, "--json")
    assert code == 0 and json.loads(text)["graph"] == str(out / "model.onnx")

    code, text, _ = asked("verify", out, "--no-quality", "--no-speed", "--json")
    assert code == 0 and json.loads(text) == json.loads((out / "report" / "report.json").read_text())

    code, text, _ = asked("report", out, "--json")
    assert code == 0 and json.loads(text)["schema"] == "nbl-export/report/2"


def test_an_error_is_an_object_too(asked: Asked, tmp_path: Path) -> None:
    code, text, said = asked("inspect", tmp_path / "nothing", "--json")
    found = json.loads(text)
    assert code == found["exit_code"] == 2 and found["schema"] == "nbl-export/error/1"
    assert said == f"error: {found['error']}\n" and "does not exist" in found["error"]
    code, text, _ = asked("selct", "--json")
    assert code == 2 and "did you mean select" in json.loads(text)["error"]
