"""Names that a terminal, a page or an encoding takes for something else are text, wherever they come from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.command_line import ENVIRONMENT, SMALL, Done

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e<script>alert(1)</script>|`[/b](javascript:x)"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def nbl(*arguments: object, cwd: Path, **environment: str) -> Done:
    """`nbl-export ARGUMENTS` with other variables; names that are not UTF-8 are given as bytes."""
    command = [
        sys.executable,
        "-m",
        "nbl_export",
        *(a if isinstance(a, bytes) else str(a) for a in arguments),
    ]
    done = subprocess.run(
        command, capture_output=True, env={**ENVIRONMENT, **environment}, cwd=cwd, timeout=120
    )
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    assert "Traceback" not in err and "Internal error" not in err, err
    assert not OBEYED.search(out + err), ascii(out + err)
    return Done(done.returncode, out, err)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"river {i} of stone walks under seven bright words.\n" for i in range(9000)))
    return path


@pytest.fixture
def graph(stories_out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stories_out / "baseline", tmp_path / "graph") / "model.onnx"


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


GRAPHS: dict[str, Callable[[Any], object]] = {
    "producer": lambda m: setattr(m, "producer_name", EVIL),
    "operator": lambda m: m.graph.node.extend(
        [onnx.helper.make_node(EVIL, ["input_ids"], ["q"], domain="x")]
    ),
    "opset": lambda m: m.opset_import.extend([onnx.helper.make_opsetid(EVIL, 1)]),
}


@pytest.mark.parametrize("where", GRAPHS)
def test_names_in_a_graph(graph: Path, where: str) -> None:
    done = nbl("inspect", edit(graph, GRAPHS[where]), cwd=graph.parent)
    assert done.code in (0, 2)
    assert "\N{REPLACEMENT CHARACTER}" in done.out + done.err


def test_names_in_a_report(stories_copy: Path) -> None:
    """The figures are as they were measured; every text of the report is somebody else's."""
    from nbl_export.report.render import write_report
    from nbl_export.report.schema import load_report

    path = stories_copy / "report" / "report.json"
    raw = json.loads(path.read_text())
    raw["model"]["source"] = f"/m/{EVIL}"
    raw["notes"] = [EVIL, f"# {EVIL}"]
    raw["divergence"] = EVIL
    for check in raw["checks"]:
        check["detail"] = EVIL
    path.write_text(json.dumps(raw))
    written = write_report(stories_copy / "report", load_report(path))
    markdown = (stories_copy / "report" / "report.md").read_text()
    assert "<script" not in markdown and "&lt;script&gt;" in markdown
    assert not OBEYED.search(markdown) and not re.search(r"(?<!\\)\]\(javascript", markdown)
    page = (stories_copy / "report" / "report.html").read_text()
    assert "<script" not in page
    suite = ET.parse(stories_copy / "report" / "junit.xml").getroot()
    assert {case.get("name") for case in suite.iter("testcase")} == {c["name"] for c in raw["checks"]}
    assert len(written) >= 4


@pytest.mark.parametrize("command", ["report", "--help"])
def test_a_terminal_of_ascii(stories_copy: Path, command: str) -> None:
    words = {"--help": ["--help"]}.get(command, [command, stories_copy])
    done = nbl(*words, cwd=stories_copy, PYTHONCOERCECLOCALE="0", LC_ALL="C", PYTHONUTF8="0")
    assert done.code == 0, done
    assert (done.out + done.err).strip()


NOT_UTF8 = os.fsdecode(b"m\xff")


def test_a_model_whose_name_is_not_utf8(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / NOT_UTF8)
    done = nbl("calibrate", os.fsencode(NOT_UTF8), "-o", "out", "--calibration", text, *SMALL, cwd=tmp_path)
    assert done.code == 2 and "not UTF-8 text: rename it" in done.err, done


def test_files_called_as_a_home_folder_is(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "~m")
    shutil.copy(text, tmp_path / "~t.txt")
    done = nbl("calibrate", "~m", "-o", "~o", "--calibration", "~t.txt", *SMALL, cwd=tmp_path)
    assert done.code == 0, done
    assert (tmp_path / "~o" / "nbl" / "workspace.json").is_file()
    assert nbl("inspect", "~o", cwd=tmp_path).code == 0
    assert nbl("calibrate", "~nobody/m", cwd=tmp_path).code == 2
