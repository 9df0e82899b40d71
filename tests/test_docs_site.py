"""The docs site builds without a warning, links lead somewhere, and what is public has an entry."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.settings.definition import Settings, settings_of
from tests.conftest import ROOT

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package, reason=f"needs {package}: pip install '.[docs]'")


def built(source: Path, target: Path, builder: str = "html") -> subprocess.CompletedProcess[str]:
    """The site of the repository at ``source``, as scripts/docs.sh builds it."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", builder]
    folders = ["-c", source / "docs" / "site", "-d", target / "doctrees", source, target / "site"]
    return subprocess.run([*command, *map(str, folders)], capture_output=True, text=True)


def entries(site: Path) -> set[str]:
    """The names that have an entry."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def test_the_site(tmp_path: Path) -> None:
    done = built(ROOT, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    site = tmp_path / "site"
    # The first page leads to one that is there.
    assert "docs/site/index.html" in (site / "index.html").read_text()
    assert (site / "docs" / "site" / "index.html").is_file() and (site / "README.html").is_file()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file(), page
    found = entries(site)
    for name in api.__all__:
        value = getattr(api, name)
        assert {f"nbl_export.api.{name}", f"{value.__module__}.{value.__qualname__}"} & found, name
    shown = (site / "docs" / "site" / "api.html").read_text(encoding="utf-8")
    kinds = [v for n in api.__all__ if isinstance(v := getattr(api, n), type) and issubclass(v, Settings)]
    for one in (one for kind in kinds for one in settings_of(kind)):
        assert f">--{one.key}<" in shown, one.key


def test_what_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "docs", source / "docs")
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "action.yml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("nbl_export", "tests"):
        (source / name).symlink_to(ROOT / name)
    with (source / "docs" / "ci.md").open("a", encoding="utf-8") as page:
        page.write("\n[a page](nowhere.md), [a place](diff.md#no-such-heading)\n")
    (source / "docs" / "alone.md").write_text("# In no list\n")
    with (source / "docs" / "site" / "api.rst").open("a", encoding="utf-8") as reference:
        reference.write("\n:class:`.NoSuchClass`\n\n.. autofunction:: nbl_export.api.no_such_function\n")
    done = built(source, tmp_path, "dummy")
    assert done.returncode == 1
    for word in ("nowhere.md", "no-such-heading", "alone.md", "NoSuchClass", "no_such_function"):
        assert word in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if "WARNING" in line]) == 5, done.stderr
