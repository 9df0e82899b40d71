"""scripts/crash.py finds what a kill spoils, and today's commands survive its short run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "crash.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("crash", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    environment = dict(os.environ)
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(environment)
    return module


CRASH = _script()


def folder(path: Path, **files: object) -> Path:
    path.mkdir()
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    (path / "data.bin").write_bytes(b"weights")
    return path


def test_anything_else_is_compared(tmp_path: Path) -> None:
    expected = CRASH.contents(folder(tmp_path / "a", report={"k": 2, "layers": [1, 3]}))
    b = folder(tmp_path / "b", report={"k": 2, "layers": [1, 4]})
    (b / "data.bin").write_bytes(b"weightz")
    (b / ".model.onnx.x.nbl.tmp").write_bytes(b"left")
    found = CRASH.differences(CRASH.contents(b), expected, set())
    assert [line.partition(":")[0] for line in found] == [
        ".model.onnx.x.nbl.tmp",
        ".model.onnx.x.nbl.tmp / bytes",
        "data.bin / bytes",
        "report.json / layers / 1",
    ]


def test_the_verdict_of_a_timing_is_not_compared_and_that_of_parity_is(tmp_path: Path) -> None:
    def of(name: str, speed: str, parity: str) -> Any:
        checks = [{"name": "nowhere slower", "status": speed}, {"name": "parity", "status": parity}]
        return CRASH.contents(folder(tmp_path / name, r={"checks": checks}))

    right = of("a", "passed", "passed")
    assert CRASH.differences(of("b", "skipped", "passed"), right, set()) == []
    (found,) = CRASH.differences(of("c", "passed", "failed"), right, set())
    assert found.startswith("r.json / checks / 1 / status")


SPOILED = """
import runpy, sys
sys.argv = ["crash.py", *{arguments!r}]
from nbl_export.rewrite import foreign
{spoil}
runpy.run_path({script!r}, run_name="__main__")
"""
SPOILS = {
    "nothing": "",
    # What was killed is neither undone nor finished.
    "no recovery": "foreign._written = lambda out: []",
}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", SPOILS)
def test_the_short_run(spoil: str, shared_data: Path, tmp_path: Path) -> None:
    arguments = ["--kills", "12", "--seed", "1", "--only", "foreign", "--work", str(tmp_path / "work")]
    code = SPOILED.format(arguments=arguments, spoil=SPOILS[spoil], script=str(SCRIPT))
    environment = {**os.environ, "NBL_EXPORT_SHARED": str(shared_data.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == (spoil != "nothing"), done.stdout + done.stderr
    kills, failures = map(int, re.findall(r"(\d+) kills, (\d+) failures, ", done.stdout)[-1])
    assert kills == 12 and (failures > 0) == (spoil != "nothing"), done.stdout
