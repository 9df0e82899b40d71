"""The pip line is one that works for how this copy was installed: each case, with names that a shell would split."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import installed
from nbl_export.installed import Origin, find_origin, is_clone, pip_command, pip_line
from nbl_export.parts import part
from tests.conftest import ROOT

NAMES = ["plain", "with space", "it's", 'a "quoted" one', "dollar$HOME;x", "brackets[1]", "50%25 é"]


def clone(folder: Path, name: str = "nbl-export") -> Path:
    """A source tree, as far as it is looked at."""
    (folder / "nbl_export").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n', encoding="utf-8")
    return folder


def site(folder: Path, monkeypatch: pytest.MonkeyPatch, direct: Any = None, package: bool = True) -> Path:
    """site-packages with this package as pip records it; the value is the folder of the package."""
    info = folder / "nbl_export-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nbl-export\nVersion: 0.1.0\n")
    if direct is not None:
        (info / "direct_url.json").write_text(direct if isinstance(direct, str) else json.dumps(direct))
    if package:
        (folder / "nbl_export").mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return (folder / "nbl_export").resolve()


def words(origin: Origin, monkeypatch: pytest.MonkeyPatch, *extras: str) -> list[str]:
    """The line as a shell reads it."""
    monkeypatch.setattr(installed, "find_origin", lambda: origin)
    return shlex.split(pip_line(*extras))


@pytest.mark.parametrize("name", NAMES)
def test_from_a_clone_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = clone(tmp_path / name)
    # The one that is installed is another.
    site(tmp_path / "site", monkeypatch, {"url": "file:///elsewhere", "dir_info": {"editable": True}})
    found = find_origin(place / "nbl_export")
    assert found == Origin(place)
    assert words(found, monkeypatch, "cpu") == ["pip", "install", f"{place}[cpu]"]


@pytest.mark.parametrize("name", NAMES)
def test_an_editable_install_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = clone(tmp_path / name)
    direct = {"url": place.as_uri(), "dir_info": {"editable": True}}
    site(tmp_path / "site", monkeypatch, direct, package=False)
    found = find_origin(place / "nbl_export")
    assert found == Origin(place, editable=True) and str(found) == f"{place} (editable)"
    assert words(found, monkeypatch, "cpu") == ["pip", "install", "-e", f"{place}[cpu]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = clone(tmp_path / name)
    package = site(tmp_path / "site", monkeypatch, {"url": place.as_uri(), "dir_info": {}})
    assert find_origin(package) == Origin(place)
    (place / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert find_origin(package) == Origin(), "what is there now is something else"


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_while_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wheel = tmp_path / name / "nbl_export-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    package = site(tmp_path / "site", monkeypatch, {"url": wheel.as_uri(), "archive_info": {"hash": "x"}})
    found = find_origin(package)
    assert found == Origin(wheel)
    assert words(found, monkeypatch, "cpu") == ["pip", "install", f"{wheel}[cpu]"]
    wheel.unlink()
    assert find_origin(package) == Origin()


def test_from_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_origin(site(tmp_path, monkeypatch))
    assert found == Origin() and str(found) == "a package index"
    assert words(found, monkeypatch, "cpu") == ["pip", "install", "nbl-export[cpu]"]
    assert pip_line("cpu", "eval") == "pip install 'nbl-export[cpu,eval]'"
    assert pip_line() == "pip install nbl-export"


@pytest.mark.parametrize(
    ("made", "has_pip", "begins", "removes"),
    [
        ({"pyvenv.cfg": "home = /usr/bin\n"}, True, "pip install", "pip uninstall -y"),
        ({"pyvenv.cfg": "home = /usr/bin\n"}, False, "pip install", "pip uninstall -y"),
        ({}, False, "pip install", "pip uninstall -y"),
        ({"pyvenv.cfg": "home = /usr/bin\nuv = 0.13.9\n"}, True, "pip install", "pip uninstall -y"),
        (
            {"pyvenv.cfg": "home = /usr/bin\nuv = 0.13.9\n"},
            False,
            f"uv pip install --python {shlex.quote(sys.executable)}",
            f"uv pip uninstall --python {shlex.quote(sys.executable)}",
        ),
        *(
            (
                {"pyvenv.cfg": "uv = 0.13.9\n", "pipx_metadata.json": "{}"},
                has_pip,
                "pipx runpip 'of nbl' install",
                "pipx runpip 'of nbl' uninstall -y",
            )
            for has_pip in (True, False)
        ),
    ],
)
def test_the_line_is_for_the_environment_that_this_runs_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: dict[str, str],
    has_pip: bool,
    begins: str,
    removes: str,
) -> None:
    environment = tmp_path / "of nbl"
    environment.mkdir()
    for name, text in made.items():
        (environment / name).write_text(text)
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setattr(installed, "_has_pip", lambda: has_pip)
    monkeypatch.setattr(installed, "find_origin", Origin)
    assert pip_line("genai") == f"{begins} 'nbl-export[genai]'"
    assert pip_command("uninstall -y") == removes
    assert replace(part("torchvision"), extra=None).pip == f"{begins} torchvision"


@pytest.mark.parametrize(
    ("direct", "requirement"),
    [
        (
            {"url": "https://x.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "nbl-export[cpu] @ git+https://x.org/r.git@abc",
        ),
        (
            {
                "url": "https://x.org/r.git",
                "vcs_info": {"vcs": "git", "commit_id": "abc", "requested_revision": "v1"},
                "subdirectory": "python",
            },
            "nbl-export[cpu] @ git+https://x.org/r.git@v1#subdirectory=python",
        ),
        (
            {"url": "https://x.org/nbl_export-0.1.0-py3-none-any.whl", "archive_info": {}},
            "nbl-export[cpu] @ https://x.org/nbl_export-0.1.0-py3-none-any.whl",
        ),
    ],
)
def test_from_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: Any, requirement: str) -> None:
    found = find_origin(site(tmp_path, monkeypatch, direct))
    assert words(found, monkeypatch, "cpu") == ["pip", "install", requirement]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"url": 7}', '{"url": "x", "vcs_info": {}}', "{}"])
def test_a_record_that_says_nothing_is_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    assert find_origin(site(tmp_path, monkeypatch, text)) == Origin()


@pytest.mark.parametrize("text", ["name = 7", "[project]\nname = 'another'", "project = 3", "{", "\xff", ""])
def test_another_project_is_no_clone(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text, encoding="latin-1")
    assert not is_clone(tmp_path) and not is_clone(tmp_path / "nowhere")
    assert is_clone(ROOT)


def test_pip_takes_the_line(tmp_path: Path) -> None:
    """pip reads the path and the extra out of it as they are meant."""
    place = clone(tmp_path / "it's a [clone]")
    (place / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    code = (
        "import sys; from pip._internal.req.constructors import install_req_from_line as read; "
        "found = read(sys.argv[1]); print(sorted(found.extras), found.link.file_path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{place}[cpu]"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"['cpu'] {place}"
