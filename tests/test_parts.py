"""The parts are those of pyproject.toml: what it asks for has a use, and an extra that is named brings the package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nbl_export.datafile import read_table
from nbl_export.installed import pip_line
from nbl_export.parts import ALWAYS, PARTS, Part, import_in_words, missing, part
from tests.conftest import ROOT

PROJECT: dict[str, Any] = read_table(ROOT / "pyproject.toml")["project"]
# The others are for who works on the project.
EXTRAS = {n: reqs for n, reqs in PROJECT["optional-dependencies"].items() if n not in ("dev", "docs")}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_what_is_always_needed_is_what_the_project_asks_for() -> None:
    assert {canonicalize_name(part.package) for part in PARTS if part.extra == ALWAYS} == names(
        PROJECT["dependencies"]
    )


def test_an_extra_brings_its_part_and_every_extra_is_named() -> None:
    for one in PARTS:
        if one.extra:
            assert canonicalize_name(one.package) in names(EXTRAS[one.extra]), one
    assert {one.extra for one in PARTS if one.extra} == set(EXTRAS)
    known = {canonicalize_name(one.package) for one in PARTS}
    assert set().union(*map(names, EXTRAS.values())) <= known


def test_a_package_is_a_part_once() -> None:
    assert len({one.package for one in PARTS}) == len(PARTS)
    assert all(one.use and part(one.package) is one for one in PARTS)


@pytest.mark.parametrize("one", PARTS, ids=lambda one: one.package)
def test_the_module_is_one_of_the_package(one: Part) -> None:
    top = one.module.partition(".")[0]
    if find_spec(top) is None:
        pytest.skip(f"needs {one.package}")
    # Of two that share a module either may be there, and a package may have its module in another, as tensorrt-rtx.
    shared = tuple(canonicalize_name(p.package) for p in PARTS if p.module == one.module)
    assert any(canonicalize_name(name).startswith(shared) for name in packages_distributions()[top])
    assert find_spec(one.module) is not None


def test_the_line_of_a_part() -> None:
    assert part("pillow").pip == pip_line("vision")
    assert part("torch").pip == pip_line()
    assert part("timm").pip == "pip install timm"
    error = missing("pillow", "Reading images")
    assert str(error) == f"Reading images needs pillow: {pip_line('vision')}." and error.exit_code == 3


def test_no_message_names_an_extra_in_a_line_of_its_own() -> None:
    """`pip install 'nbl-export[…]'` is written in one place, which knows what works here."""
    found = []
    for path in sorted((ROOT / "nbl_export").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docs else ""
            if re.search(r"nbl-export\[\w", str(text)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_the_pages_name_extras_that_are_there() -> None:
    pages: list[Path] = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for line in re.findall(r"pip install '[^']*\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
            assert set(line.split(",")) <= {*EXTRAS, "dev"}, (page, line)


@pytest.mark.parametrize("module", ["cyclopts", "rich", "numpy"])
def test_a_package_without_which_nothing_goes_on_is_named(module: str, tmp_path: Path) -> None:
    """At the start, while the help is drawn, and while a command works."""
    code = f"import sys; sys.modules[{module!r}] = None; from nbl_export.cli import main; main()"
    words = ["inspect", str(tmp_path)] if module == "numpy" else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line == f"error: {module} is not installed, which nbl-export needs: {pip_line()}."


def test_a_package_that_is_broken_is_sent_to_doctor(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('libblas.so.3: no such file', name='numpy')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "nbl_export", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: numpy cannot be imported (libblas.so.3: no such file): nbl-export doctor")


def test_a_module_of_ours_that_is_missing_is_our_fault() -> None:
    assert import_in_words(ModuleNotFoundError("x", name="nbl_export.gone")) is None
    assert import_in_words(ImportError("cannot import name 'x'", name="nbl_export.parts")) is None
    assert import_in_words(ImportError("who knows")) is None
