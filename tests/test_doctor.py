"""A package that is there and broken is said to be, what keeps the main job from running is told from the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import doctor as module
from nbl_export.doctor import DRIVER, Found, doctor, lacking, problems, try_all, within
from nbl_export.packages import ALWAYS, PARTS, pip_line
from tests.listening import Notes

Module = Callable[[str, str], str]
ALL = tuple(Found(part.package, "1.0", "", part.use, "", part.extra, "", part.pip) for part in PARTS)


def parts(**changed: Any) -> tuple[Found, ...]:
    """All parts in version 1.0, but onnxruntime-gpu; ``changed`` by name (``-`` is ``_``)."""
    changed = {"onnxruntime_gpu": {"version": None}, **changed}
    return tuple(replace(one, **changed.get(one.package.replace("-", "_"), {})) for one in ALL)


MISSING, BROKEN, OLD = {"version": None}, {"error": "died by SIGSEGV"}, {"takes": ">=2.9"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Makes a module of a name, before all others of the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return make


def test_where_all_is_well_nothing_is_said() -> None:
    assert list(lacking(parts())) == [] and list(problems(parts())) == []


@pytest.mark.parametrize("part", [PARTS[0], *[p for p in PARTS if p.package in ("timm", "gguf")]], ids=str)
def test_what_is_always_needed_is_lacking_and_the_rest_a_problem(part: Any) -> None:
    name, needed = part.package.replace("-", "_"), part.extra == ALWAYS
    missing, broken, old = (parts(**{name: how}) for how in (MISSING, BROKEN, OLD))
    assert list(lacking(missing)) == [f"{part.package} is missing ({part.use}): {part.pip}."] * needed
    assert list(problems(missing)) == []
    for found, begins in (
        (broken, f"{part.package} 1.0 is installed, and trying it died by SIGSEGV: pip install --force-"),
        (old, f"{part.package} 1.0 is installed, and >=2.9 is needed: pip install '{part.package}>=2.9'."),
    ):
        told, silent = (lacking, problems) if needed else (problems, lacking)
        (said,) = told(found)
        assert said.startswith(begins) and list(silent(found)) == []


def test_one_runtime_is_enough_none_is_not_and_both_are_too_many() -> None:
    assert list(lacking(parts(onnxruntime=MISSING, onnxruntime_gpu={"version": "1.0"}))) == []
    lines = pip_line("cpu"), pip_line("gpu")
    (none,) = lacking(parts(onnxruntime=MISSING))
    assert none == f"No runtime is there for graphs: {lines[0]} or, for CUDA, {lines[1]}, never both."
    (broken,) = lacking(parts(onnxruntime=BROKEN))
    assert "trying it died by SIGSEGV" in broken and list(problems(parts(onnxruntime=BROKEN))) == []
    (both,) = problems(parts(onnxruntime_gpu={"version": "1.0"}))
    assert both.startswith("onnxruntime and onnxruntime-gpu are both installed") and lines[1] in both


@pytest.mark.parametrize(
    ("number", "specifier", "inside"),
    [
        ("2.13.0+cpu", ">=2.9", True),
        ("2.8.1", ">=2.9", False),
        ("12.0", ">=10.15,<12", False),
        ("3.0rc1", ">=2.9", True),
        ("built by hand", ">=2.9", True),
    ],
)
def test_a_version_is_in_a_range(number: str, specifier: str, inside: bool) -> None:
    assert within(number, specifier) is inside


WRONG = {
    "raises": ("raise ImportError('libx.so.1: no\\nmore')", "failed (ImportError: libx.so.1: no)"),
    "exits": ("import sys; sys.exit('no licence')", "failed (SystemExit: no licence)"),
    "ends": ("import os; os._exit(7)", "ended with exit code 7"),
    "aborts": ("import os; os.abort()", "died by SIGABRT"),
    "sleeps": ("import time; time.sleep(600)", "made no progress in 9 s"),
}


def test_a_broken_package_is_named_with_its_reason_and_those_after_it_are_tried(
    made: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 9)
    names = ["json"]
    for how, (source, _) in WRONG.items():
        names += [made(how, source), made(f"after_{how}", "")]
    listener = Notes()
    found = try_all(names, listener)
    assert {n: t.error for n, t in found.items() if t.error and n != DRIVER} == {
        n: why for n, (_, why) in WRONG.items()
    }
    assert sum(listener.advanced) == len(names) + 1


FAKE = """
class SessionOptions: pass
__version__ = "9.9"
class InferenceSession:
    def __init__(self, graph, options, providers):
        self.providers = providers
        if "CUDAExecutionProvider" in providers and {cuda!r} == "raises": raise RuntimeError("no cudnn.\\nmore")
    def run(self, names, feeds):
        import numpy
        return [numpy.array({y})]
    def get_providers(self):
        return ["CPUExecutionProvider"] if {cuda!r} == "falls back" else self.providers
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
"""


@pytest.mark.parametrize(
    ("cuda", "y", "said"),
    [
        ("works", "[[14, 26]]", ""),
        ("falls back", "[[14, 26]]", "CUDAExecutionProvider does not start"),
        ("raises", "[[14, 26]]", "CUDAExecutionProvider does not start (no cudnn)"),
        ("works", "[[14, 27]]", "failed (RuntimeError: CPUExecutionProvider computes wrongly)"),
    ],
)
def test_a_runtime_is_tried_on_each_provider(made: Module, cuda: str, y: str, said: str) -> None:
    made("onnxruntime", FAKE.format(cuda=cuda, y=y))
    trial = try_all(["onnxruntime"], Notes())["onnxruntime"]
    assert (trial.error or trial.facts["no_gpu"]) == said
    assert trial.error or trial.facts["providers"] == ["CUDA", "CPU"]


def test_this_machine_with_a_runtime_that_crashes_in_a_locale_of_before(
    made: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("onnxruntime", "import os; os.abort()")
    monkeypatch.setattr(module.locale, "getpreferredencoding", lambda _: "ANSI_X3.4-1968")
    monkeypatch.setattr(module, "_free", lambda _folder: 5 << 20)
    found = doctor()
    (said,) = found.lacking
    assert "is installed, and trying it died by SIGABRT" in said and not found.runs_here
    assert any("ANSI_X3.4-1968" in problem for problem in found.problems)
    assert any("the folder for temporary files, has 5 MiB free" in problem for problem in found.problems)
    machine, packages = found.tables
    assert dict(machine.rows)["Python"].endswith(sys.executable)  # type: ignore[arg-type]
    states = {row[0]: row[2] for row in packages.rows}
    assert states["torch"] == "works" and states["onnxruntime"] == "broken"
    assert all(states[name.partition(":")[0]] == "missing" for name, _ in found.offers)
