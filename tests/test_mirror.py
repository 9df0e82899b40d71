"""Tests mirror the rooms: who looks for the tests of a module knows their file, and whose module a test file is.

1. The module ``nbl_export/<room>/<module>.py`` is tested by ``tests/<room>/test_<module>.py``, and beside it, where one
   file would be too long or mixes the slow with the quick, by files ``test_<module>_<aspect>.py``. :data:`UNTESTED`
   are the modules without such a file, each with its reason.
2. ``tests/scripts/`` mirrors ``scripts/`` in the same way.
3. What shows a theme across rooms (a model all the way, a matrix of exporters, hostile files) is in a folder of
   :data:`THEMES`, where a file has any name. :data:`HERE` are the files that stand beside this one all the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT

UNTESTED = {
    "__init__.py": "holds the version alone",
    "__main__.py": "calls cli.main; tests of the command line run it as a process",
    "batch/arrays.py": "names types and computes nothing",
    "checks.py": "a value, that test_checks.py of verify/speed and test_measurement.py fill",
    "runtime/decoder.py": "a protocol and a value, that test_torch.py, test_ort.py and test_stream.py fill",
    "verify/loss/figures.py": "values, that test_decoder.py and test_encoder.py beside it compute by hand",
}
THEMES = {
    "end_to_end": "several rooms at once",
    "clients": "other projects' consumers of our files",
    "gpu": "needs an NVIDIA GPU",
    "hostile": "what somebody else may have made: folders, models, text",
}
HERE = {
    "test_mirror.py": "of the tests themselves",
    "test_rooms.py": "of the package as a whole",
    "test_exhaustive.py": "of the tests that the usual run leaves out",
    "test_preloaded.py": "of the processes of tests",
    "test_traced_once.py": "of the graphs that tests share",
    "test_measured_once.py": "of the rates that tests share",
    "test_replaced.py": "of what tests replace, for the two",
    "test_docs.py": "of README and docs",
    "test_docs_site.py": "of the site that is made of them",
    "test_docs_commands.py": "of the commands in them",
    "test_packaging.py": "of the wheel and the sdist",
    "test_families.py": "scripts/families_table.py and docs/families.md call it by this path",
}


def modules(package: Path) -> set[Path]:
    """The modules below ``package``; the ``__init__.py`` of its folders are empty and tested by nothing."""
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    return {path for path in files if path.name != "__init__.py" or path.parent == Path()}


def module_of(test: Path, known: set[Path]) -> Path | None:
    """The module that a test file is named for, the longest name that fits; None if there is none."""
    words = test.stem.removeprefix("test_").split("_")
    names = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((module for name in names if (module := test.parent / f"{name}.py") in known), None)


def amiss(known: set[Path], tests: set[Path]) -> tuple[set[Path], set[Path]]:
    """The modules without a test file of their name, and the test files that are named for no module."""
    mirrored = {test: module_of(test, known) for test in tests}
    # A file of one aspect does not stand for the module's own.
    own = {module for test, module in mirrored.items() if module and test.stem == f"test_{module.stem}"}
    return known - own, {test for test, module in mirrored.items() if module is None}


def listed(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("test_*.py")}


def test_every_module_has_a_test_and_every_test_a_module() -> None:
    found = {test for test in listed(ROOT / "tests") if test.parts[0] not in {*THEMES, "scripts"}}
    untested, alone = amiss(modules(ROOT / "nbl_export"), found)
    assert {path.as_posix() for path in untested} == set(UNTESTED)
    assert {path.as_posix() for path in alone} == set(HERE)


def test_the_tests_of_scripts_are_named_for_one() -> None:
    _, alone = amiss(modules(ROOT / "scripts"), listed(ROOT / "tests" / "scripts"))
    assert alone == set()


def test_every_folder_of_tests_is_a_room_or_a_theme() -> None:
    folders = {path.parent for path in listed(ROOT / "tests")} - {Path()}
    for folder in folders:
        room = ROOT if folder.parts[0] == "scripts" else ROOT / "nbl_export"
        assert folder.parts[0] in THEMES or (room / folder).is_dir(), folder


@pytest.mark.parametrize(
    ("tests", "untested", "alone"),
    [
        (["a/test_store.py", "a/test_store_append.py", "test_files.py"], set(), set()),
        (["a/test_store_append.py", "test_files.py"], {"a/store.py"}, set()),
        (["a/test_store.py", "test_files.py", "a/test_storage.py"], set(), {"a/test_storage.py"}),
        (
            ["test_store.py", "a/test_files.py"],
            {"a/store.py", "files.py"},
            {"test_store.py", "a/test_files.py"},
        ),
    ],
    ids=["right", "an aspect alone", "another name", "the wrong rooms"],
)
def test_what_is_missing_and_what_is_left_over_is_named(
    tmp_path: Path, tests: list[str], untested: set[str], alone: set[str]
) -> None:
    package = tmp_path / "package"
    (package / "a").mkdir(parents=True)
    for name in ("__init__.py", "files.py", "a/__init__.py", "a/store.py"):
        (package / name).touch()
    missing, left_over = amiss(modules(package) - {Path("__init__.py")}, {Path(name) for name in tests})
    assert {path.as_posix() for path in missing} == untested
    assert {path.as_posix() for path in left_over} == alone
