"""The wheel and the sdist: what is in them, what an index says of them, and that an installed copy works anywhere."""

from __future__ import annotations

import email
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from nbl_export import __version__
from tests.conftest import ROOT

pytest.importorskip("hatchling", reason="needs hatchling: pip install '.[dev]'")
pytest.importorskip("hatch_fancy_pypi_readme", reason="needs hatch-fancy-pypi-readme: pip install '.[dev]'")
OURS = ("nbl_export/", f"nbl_export-{__version__}.dist-info/")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of this source tree; its name is one that a shell would split."""
    folder = tmp_path_factory.mktemp("it's built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{OURS[1]}METADATA"))


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


def test_the_sdist_can_be_tested_and_built(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "docs/configuration.md"} < names
    assert package_files() < names
    assert not any(name.startswith((".venv", ".cache", "out/")) for name in names)


def test_what_an_index_says(metadata: Message) -> None:
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier", [])
    for minor in range(11, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert not any(c.startswith("License ::") for c in classifiers), "the expression excludes it"
    text = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown" and text.startswith("# nbl-export")
    # A file of the repository is not beside an index page.
    assert set(re.findall(r"\]\((?!https://)([^)]*)\)", text)) == set()
    assert "Contributing, security, changelog" in text and "(https://arxiv.org/abs/2505.21077)" in text


@pytest.mark.slow
def test_an_installed_copy_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Beside the packages of this environment, without its own source tree."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
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
