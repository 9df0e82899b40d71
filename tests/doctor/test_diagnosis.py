"""What keeps the main job from running, what else is wrong, and what is fine: each is told from the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.doctor.diagnosis import lacking, problems
from nbl_export.doctor.machine import Place
from nbl_export.doctor.ranges import Clash
from nbl_export.engine.gpu import Gpu
from nbl_export.installed import pip_line
from nbl_export.parts import ALWAYS, PARTS
from tests.conftest import ROOT
from tests.doctor.made import MACHINE, parts

PYTHON = ">=3.10"
BROKEN = {"error": "died by SIGSEGV"}


def test_where_all_is_well_nothing_is_said() -> None:
    assert list(lacking(MACHINE, parts(), PYTHON)) == [] and list(problems(MACHINE, parts(), [])) == []


@pytest.mark.parametrize("part", [p for p in PARTS if p.extra == ALWAYS], ids=lambda p: p.package)
def test_each_package_that_is_always_needed_is(part: Any) -> None:
    name = part.package.replace("-", "_")
    (missing,) = lacking(MACHINE, parts(**{name: None}), PYTHON)
    assert missing == f"{part.package} is missing ({part.use}): {pip_line()}."
    (broken,) = lacking(MACHINE, parts(**{name: BROKEN}), PYTHON)
    assert broken.startswith(
        f"{part.package} 1.0 is installed, and trying it died by SIGSEGV: pip install --force-"
    )
    (old,) = lacking(MACHINE, parts(**{name: {"takes": ">=2.9"}}), PYTHON)
    assert old == (
        f"{part.package} 1.0 is installed, and >=2.9 is needed: pip install '{part.package}>=2.9'."
    )


def test_one_runtime_is_enough_and_none_is_not() -> None:
    gpu = {"version": "1.0"}
    assert list(lacking(MACHINE, parts(onnxruntime=None, onnxruntime_gpu=gpu), PYTHON)) == []
    (none,) = lacking(MACHINE, parts(onnxruntime=None), PYTHON)
    assert none == (
        f"No runtime is there for graphs: {pip_line('cpu')} or, for CUDA, {pip_line('gpu')}, never both."
    )
    (broken,) = lacking(MACHINE, parts(onnxruntime=BROKEN), PYTHON)
    assert broken.startswith("onnxruntime 1.0 is installed, and trying it died by SIGSEGV")
    assert list(problems(MACHINE, parts(onnxruntime=BROKEN), [])) == [], "said once"


def test_python_out_of_range() -> None:
    (said,) = lacking(replace(MACHINE, python="3.9.18"), parts(), PYTHON)
    assert "Python 3.9.18" in said and ">=3.10" in said
    assert list(lacking(replace(MACHINE, python="3.14.0rc1"), parts(), PYTHON)) == []


def test_what_an_extra_brings_is_no_reason_not_to_run() -> None:
    for one in PARTS:
        if one.extra == ALWAYS or one.module == "onnxruntime":
            continue
        name = one.package.replace("-", "_")
        for how in (None, BROKEN, {"takes": ">=2"}):
            assert list(lacking(MACHINE, parts(**{name: how}), PYTHON)) == []
        assert list(problems(MACHINE, parts(**{name: None}), [])) == []
        assert len(list(problems(MACHINE, parts(**{name: BROKEN}), []))) == 1
        (said,) = problems(MACHINE, parts(**{name: {"takes": ">=2"}}), [])
        assert said.startswith(f"{one.package} 1.0 is installed, and >=2 is needed")


def test_two_with_one_module() -> None:
    (said,) = problems(MACHINE, parts(onnxruntime_gpu={"version": "1.0"}), [])
    assert said == (
        "onnxruntime and onnxruntime-gpu are both installed and share one module: pip uninstall -y onnxruntime "
        f"onnxruntime-gpu, then {pip_line('cpu')} or {pip_line('gpu')}."
    )


def test_a_clash_is_said_with_both_ways_out() -> None:
    clash = Clash("optimum-onnx", "0.1.0", "transformers", "<4.58", "5.24.0")
    (said,) = problems(MACHINE, parts(), [clash])
    assert said.startswith(
        "optimum-onnx 0.1.0 takes transformers<4.58, and 5.24.0 is installed: pip install "
    )
    assert "'transformers<4.58'" in said and "environment of its own" in said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoding": "ANSI_X3.4-1968"}, ("ANSI_X3.4-1968", "LANG=C.UTF-8")),
        ({"temporary": Place("/tmp", 5 << 20)}, ("/tmp", "5 MiB free", "TMPDIR")),
        ({"temporary": Place("", None)}, ("TMPDIR",)),
        ({"here": Place("", None)}, ("gone",)),
    ],
)
def test_what_surrounds_it(changed: dict[str, Any], words: tuple[str, ...]) -> None:
    (said,) = problems(replace(MACHINE, **changed), parts(), [])
    assert all(word in said for word in words) and said.endswith(".")
    assert list(lacking(replace(MACHINE, **changed), parts(), PYTHON)) == []


@pytest.mark.parametrize("encoding", ["UTF-8", "utf-8", "utf8"])
def test_utf8_by_any_name(encoding: str) -> None:
    assert list(problems(replace(MACHINE, encoding=encoding), parts(), [])) == []


def test_a_gpu_that_nobody_uses() -> None:
    machine = replace(
        MACHINE,
        gpus=(Gpu("NVIDIA H100", "9.0"),),
        gpu_memory=(80 << 30,),
        no_gpu={"torch": "a build without CUDA", "onnxruntime": "no provider"},
    )
    assert list(problems(machine, parts(), [])) == [
        "There is an NVIDIA GPU, but onnxruntime does not use it: no provider.",
        "There is an NVIDIA GPU, but torch does not use it: a build without CUDA.",
    ]


# as a user does it ---------------------------------------------------------------------------------

# The page's own words, and all that they found.
PAGE = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
CODE = f"""{PAGE}
import json
from nbl_export.records import to_json
print(json.dumps({{**to_json(found), "runs": found.runs_here}}))
"""


def asked(tmp_path: Path, **environment: str) -> dict[str, Any]:
    """The diagnosis of a process in ``tmp_path``, whose modules come first."""
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), **environment}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, env=changed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def test_a_runtime_that_crashes_and_a_locale_of_before(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    (tmp_path / "soundfile.py").write_text("raise OSError('libsndfile.so.1 is not there')")
    found = asked(tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    (said,) = found["lacking"]
    assert not found["runs"]
    assert said.startswith("onnxruntime 1.") and "is installed, and trying it died by SIGABRT" in said
    assert any("libsndfile.so.1 is not there" in problem for problem in found["problems"])
    assert any("ANSI_X3.4-1968" in problem for problem in found["problems"])
    by_name = {part["package"]: part for part in found["parts"]}
    assert by_name["torch"]["version"] and not by_name["torch"]["error"]
    assert found["machine"]["here"]["folder"] == str(tmp_path)
