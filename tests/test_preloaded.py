"""A command in a copy of a process that has the libraries does what it does in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import preloaded
from tests.command_line import ENVIRONMENT, FAST, SMALL, nbl
from tests.tiny import build


@pytest.mark.parametrize(
    "words", [["--version"], ["inspect", "."], ["selct"], [], ["inspect", "here", "--json"]]
)
def test_it_is_what_a_process_of_its_own_does(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-m", "nbl_export", *words]
    alone = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    done = nbl(*words, cwd=tmp_path)
    assert (done.code, done.out, done.err) == (alone.returncode, alone.stdout, alone.stderr)
    assert done.out or done.err


def test_one_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "nbl-export.toml").write_text("[select]\nkk = 1\n")
    assert "nbl-export.toml" in nbl("run", "model", cwd=tmp_path).err
    assert "nbl-export.toml" not in nbl("run", "model").err
    assert nbl("inspect", "model", "--log-file", tmp_path / "log", limit=1).code != 0
    assert (tmp_path / "log").stat().st_size <= 1
    assert nbl("inspect", "model", "--log-file", tmp_path / "long").code == 2
    assert (tmp_path / "long").stat().st_size > 1


def test_it_takes_what_the_run_has_found(tmp_path: Path) -> None:
    text, kept, out = tmp_path / "text.txt", tmp_path / "kept", tmp_path / "out"
    model = build(tmp_path / "model", num_hidden_layers=1)
    text.write_text(
        "".join(f"{n} stones walk under a bright river, and seven with them.\n" for n in range(9000))
    )

    def run(*words: object, kept: Path | None) -> tuple[int, str, str]:
        return preloaded.run([*map(str, words)], ENVIRONMENT, None, None, kept, timeout=300)

    done = run(model, "--k", 1, "-o", out, "--calibration", text, *SMALL, *FAST, kept=kept)
    assert done[0] == 0, done
    assert list(kept.glob("*.checked")) and list(kept.glob("cpu-float32-*.json"))
    (graph,) = kept.glob("*.onnx")
    graph.write_bytes(b"")  # for protobuf, a model without a graph
    shutil.rmtree(out / "baseline")
    code, _, err = run("export", out, kept=kept)
    assert code == 4 and "does not have an ir_version" in err, err


def test_the_server_is_no_child_of_this_process() -> None:
    assert nbl("--version").code == 0
    servers = [p for p in psutil.Process().children(recursive=True) if "tests.preloaded" in p.cmdline()]
    assert servers == []


def test_what_does_not_end_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        preloaded.run(["--help"], ENVIRONMENT, None, None, None, timeout=0.001)
    assert nbl("--version").code == 0
