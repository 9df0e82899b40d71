"""The tables that are shipped: read as UTF-8 on every machine, and all of them read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.datafile import TomlError, read_table
from nbl_export.errors import InputError
from tests.conftest import ROOT

TABLES = sorted((ROOT / "nbl_export").rglob("*.toml"))
TEXT = '[a]\nname = "狐"\nlimits = [1e-3, 2]\n\n[a.b]\non = true\n'
VALUES = {"a": {"name": "狐", "limits": [0.001, 2], "b": {"on": True}}}


def test_a_table_is_what_toml_says(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(TEXT, encoding="utf-8")
    assert read_table(tmp_path / "t.toml") == VALUES


def test_a_machine_with_another_encoding_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(TEXT, encoding="utf-8")
    code = (
        "import locale, sys; from pathlib import Path; from nbl_export.datafile import read_table\n"
        "assert locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8')\n"
        "print(ascii(read_table(Path(sys.argv[1]))))"
    )
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, str(tmp_path / "t.toml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ascii(VALUES)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_table_of_the_package_is_read_from_where_it_lies(path: Path) -> None:
    assert read_table(path)
    # What reads it stands beside it and names it.
    beside = [p for p in path.parent.glob("*.py") if f'"{path.name}"' in p.read_text(encoding="utf-8")]
    assert beside, f"nothing beside {path} reads it"


def test_there_are_tables() -> None:
    assert {path.name for path in TABLES} >= {"families.toml", "tasks.toml", "gates.toml", "shapes.toml"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a = " + "9" * 5000, "too many digits"), ("a = " + "[" * 100_000, "nested too deep")],
    ids=["digits", "deep"],
)
def test_what_python_cannot_hold_is_no_toml(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(TomlError, match=reason):
        read_table(tmp_path / "t.toml")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.toml")
    with pytest.raises(InputError, match="is not a regular file"):
        read_table(tmp_path / "t.toml")
