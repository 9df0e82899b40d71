"""The parts are those of pyproject.toml, and a pip line works for how this copy was installed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nbl_export import __version__, packages
from nbl_export import doctor as module
from nbl_export.doctor import DRIVER, Found, judged, out_of_range, try_all
from nbl_export.errors import MissingDependencyError
from nbl_export.packages import ALWAYS, PARTS, check_system, import_in_words, missing, origin, part, pip_line
from tests.conftest import ROOT
from tests.processes import Notes

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The others are for who works on the project.
EXTRAS = {n: reqs for n, reqs in PROJECT["optional-dependencies"].items() if n not in ("dev", "docs")}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_the_parts_are_what_the_project_asks_for_and_every_extra_brings_its_own() -> None:
    always = {canonicalize_name(part.package) for part in PARTS if part.extra == ALWAYS}
    assert always == names(PROJECT["dependencies"])
    for one in PARTS:
        assert one.use and part(one.package) is one
        assert not one.extra or canonicalize_name(one.package) in names(EXTRAS[one.extra]), one
    assert {one.extra for one in PARTS if one.extra} == set(EXTRAS)
    assert set().union(*map(names, EXTRAS.values())) <= {canonicalize_name(one.package) for one in PARTS}


def test_the_line_of_a_part() -> None:
    assert part("pillow").pip == pip_line("vision") and part("torch").pip == pip_line()
    assert part("timm").pip == "pip install timm"
    error = missing("pillow", "Reading images")
    assert str(error) == f"Reading images needs pillow: {pip_line('vision')}." and error.exit_code == 3


@pytest.mark.parametrize("module", ["cyclopts", "numpy"])
def test_a_package_without_which_nothing_goes_on_is_named(module: str, tmp_path: Path) -> None:
    """At the start, while the help is drawn, and while a command works."""
    code = f"import sys; sys.modules[{module!r}] = None; from nbl_export.cli import main; main()"
    words = ["inspect", str(tmp_path)] if module == "numpy" else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"error: {module} is not installed, which nbl-export needs: {pip_line()}.\n"


def test_a_package_that_is_broken_is_sent_to_doctor(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('libblas.so.3: no such file', name='numpy')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "nbl_export", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(
        "error: numpy cannot be imported (libblas.so.3: no such file): nbl-export doctor"
    )
    assert import_in_words(ModuleNotFoundError("x", name="nbl_export.gone")) is None, "that is our fault"


def test_windows_is_refused() -> None:
    with pytest.raises(MissingDependencyError, match=r"Linux.*Windows.*WSL") as caught:
        check_system("win32")
    assert caught.value.exit_code == 3
    hidden = "[sys.modules.__setitem__(name, None) for name in ('fcntl', 'resource', 'pty', 'termios')]"
    code = f"import sys; sys.platform = 'win32'; {hidden}; from nbl_export.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("error: nbl-export runs on Linux"), done.stderr


# where this copy came from -------------------------------------------------------------------------

GIT = {
    "url": "https://x.org/r.git",
    "vcs_info": {"vcs": "git", "commit_id": "abc", "requested_revision": "v1"},
}


@pytest.mark.parametrize(
    ("direct", "clone", "words"),
    [
        ({}, True, ["{place}[cpu]"]),
        ({"url": "{url}", "dir_info": {"editable": True}}, True, ["-e", "{place}[cpu]"]),
        ({"url": "{url}", "dir_info": {}}, False, ["{place}[cpu]"]),
        ({"url": "file:///gone/nbl_export.whl", "archive_info": {}}, False, ["nbl-export[cpu]"]),
        (GIT, False, ["nbl-export[cpu] @ git+https://x.org/r.git@v1"]),
        ({"url": "https://x.org/a.whl"}, False, ["nbl-export[cpu] @ https://x.org/a.whl"]),
        (None, False, ["nbl-export[cpu]"]),
    ],
    ids=["clone", "editable", "path", "path that is gone", "git", "URL", "index"],
)
def test_the_line_is_of_where_this_copy_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: Any, clone: bool, words: list[str]
) -> None:
    place = tmp_path / "it's a [clone] of $HOME"
    place.mkdir()
    if clone:
        (place / "pyproject.toml").touch()
    info = tmp_path / "site" / "nbl_export-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nbl-export\nVersion: 0.1.0\n")
    if direct is not None:
        (info / "direct_url.json").write_text(json.dumps(direct).replace("{url}", place.as_uri()))
    monkeypatch.setattr(sys, "path", [str(info.parent), *sys.path])
    monkeypatch.setattr(packages, "origin", lambda: origin(place))
    assert shlex.split(pip_line("cpu")) == ["pip", "install", *(word.format(place=place) for word in words)]


def test_the_line_is_for_an_environment_of_pipx_or_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "origin", lambda: ("", False))
    monkeypatch.setattr(packages, "find_spec", lambda _name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda _name: "/bin/uv")
    assert pip_line("a", "b") == f"uv pip install --python {shlex.quote(sys.executable)} 'nbl-export[a,b]'"
    (tmp_path / "pipx_metadata.json").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert pip_line("a") == f"pipx runpip {tmp_path.name} install 'nbl-export[a]'"


# packaging -----------------------------------------------------------------------------------------

OURS = ("nbl_export/", f"nbl_export-{__version__}.dist-info/")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of this source tree; its name is one that a shell would split."""
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason="needs what builds a wheel: pip install '.[dev]'")
    folder = tmp_path_factory.mktemp("it's built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def package_files() -> set[str]:
    """Every file of the package in the source tree, but what Python writes."""
    files = (path for path in (ROOT / "nbl_export").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert all(name.startswith(OURS) for name in names)
    assert {name for name in names if name.startswith(OURS[0])} == package_files()
    data = {Path(name).suffix for name in names if name.startswith(OURS[0])}
    assert {".toml", ".j2", ".css"} < data and "nbl_export/py.typed" in names
    assert {f"{OURS[1]}{name}" for name in ("licenses/LICENSE", "entry_points.txt")} < names


def test_an_installed_copy_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Beside the packages of this environment, without its own source tree."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        *["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"],
        str(site),
    ]
    subprocess.run([*pip, str(wheel)], check=True)

    def nbl(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100"}
        command = [str(site / "bin" / "nbl-export"), *words]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout

    assert nbl("--version").strip() == f"nbl-export {__version__}"
    assert nbl("--help").startswith("Usage: nbl-export")
    said = nbl("doctor")
    # Of the two runtimes one is missing; the wheel is still there, and brings it.
    lines = [f"pip install {shlex.quote(f'{wheel}[{extra}]')}" for extra in ("cpu", "gpu")]
    assert any(line in said for line in lines)
    # The Python that runs it may stand in the source tree.
    assert str(ROOT) not in said.replace(sys.executable, "")
    assert said.splitlines()[-1] == "The main job runs here."
    assert list(elsewhere.iterdir()) == []


# doctor --------------------------------------------------------------------------------------------

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
    assert judged(parts()) == ((), ())


@pytest.mark.parametrize("name", ["torch", "timm"])
def test_what_is_always_needed_is_lacking_and_the_rest_a_problem(name: str) -> None:
    one, needed = part(name), name == "torch"
    missing = f"torch is missing ({one.use}): {one.pip}."
    assert judged(parts(**{name: MISSING})) == (((missing,) if needed else ()), ())
    for how, begins in (
        (BROKEN, f"{name} 1.0 is installed, and trying it died by SIGSEGV: pip install --force-"),
        (OLD, f"{name} 1.0 is installed, and >=2.9 is needed: pip install '{name}>=2.9'."),
    ):
        (said,), silent = judged(parts(**{name: how}))[:: 1 if needed else -1]
        assert said.startswith(begins) and silent == ()


def test_one_runtime_is_enough_none_is_not_and_both_are_too_many() -> None:
    assert judged(parts(onnxruntime=MISSING, onnxruntime_gpu={"version": "1.0"})) == ((), ())
    lines = pip_line("cpu"), pip_line("gpu")
    assert judged(parts(onnxruntime=MISSING)) == (
        (f"No runtime is there for graphs: {lines[0]} or, for CUDA, {lines[1]}, never both.",),
        (),
    )
    (broken,), problems = judged(parts(onnxruntime=BROKEN))
    assert "trying it died by SIGSEGV" in broken and problems == ()
    lacking, (both,) = judged(parts(onnxruntime_gpu={"version": "1.0"}))
    assert both.startswith("onnxruntime and onnxruntime-gpu are both installed") and lacking == ()


def test_a_version_is_in_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.9", "numpy>=1,<2", "lm-eval>=9; extra == 'eval'", "old>=9; extra == 'none'"]
    monkeypatch.setattr(module, "requires", lambda _: needs)
    there = {"torch": "2.13.0+cpu", "numpy": "2.0", "lm-eval": "1.0", "old": "1.0"}
    assert out_of_range(there) == {"numpy": "<2,>=1", "lm-eval": ">=9"}
    assert out_of_range({"torch": "3.0rc1"}) == out_of_range({"torch": "built by hand"}) == {}


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
    assert {n: error for n, (error, _) in found.items() if error and n != DRIVER} == {
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
    error, facts = try_all(["onnxruntime"], Notes())["onnxruntime"]
    assert (error or facts["no_gpu"]) == said
    assert error or facts["providers"] == ["CUDA", "CPU"]
