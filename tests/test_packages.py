"""The parts are those of pyproject.toml, and a pip line works for how this copy was installed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nbl_export import packages
from nbl_export.errors import MissingDependencyError
from nbl_export.packages import ALWAYS, PARTS, check_system, import_in_words, missing, origin, part, pip_line
from tests.conftest import ROOT

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


def test_the_pages_name_extras_that_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(r"pip install '[^']*\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
            assert set(line.split(",")) <= {*EXTRAS, "dev"}, (page, line)


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
        ({"url": "file:///elsewhere", "dir_info": {"editable": True}}, True, ["{place}[cpu]"]),
        ({"url": "{url}", "dir_info": {}}, False, ["{place}[cpu]"]),
        ({"url": "file:///gone/nbl_export.whl", "archive_info": {}}, False, ["nbl-export[cpu]"]),
        (GIT, False, ["nbl-export[cpu] @ git+https://x.org/r.git@v1"]),
        ({"url": "https://x.org/a.whl"}, False, ["nbl-export[cpu] @ https://x.org/a.whl"]),
        (None, False, ["nbl-export[cpu]"]),
    ],
    ids=["clone", "editable", "another's record", "path", "path that is gone", "git", "URL", "index"],
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
