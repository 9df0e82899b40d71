"""``nbl-export.toml``: settings in a file, one table for each command.

[select]
k = 8
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import TomlError, read_table
from nbl_export.settings import graphs, making, measuring
from nbl_export.settings.definition import Settings, settings_of

NAME = "nbl-export.toml"
TABLES: dict[str, type[Settings]] = {
    "calibrate": making.CalibrateSettings,
    "select": making.SelectSettings,
    "export": graphs.ExportSettings,
    "build": graphs.EngineSettings,
    "verify": measuring.VerifySettings,
    "eval": measuring.EvalSettings,
    "bench": measuring.BenchSettings,
    "generate": measuring.GenerateSettings,
    "convert": graphs.ConvertSettings,
    "diff": measuring.DiffBounds,
    "run": graphs.FolderSettings,
}


def read_settings(path: Path) -> dict[tuple[str, str], Any]:
    """The values of a file by table and key, all of them checked.

    Raises :class:`InputError` for a file that cannot be read, an unknown table or key, and a value that is refused.
    """
    try:
        raw = read_table(path)
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file.") from None
    except OSError as error:
        raise os_error_in_words(error, "reading the settings") from None
    except (TomlError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {str(error).rstrip('.')}.") from None
    found = {}
    for table, values in raw.items():
        if not isinstance(values, dict):
            _refuse_code(path, table)
            known = ", ".join(f"[{name}]" for name in TABLES)
            raise InputError(f"{path}: {table} stands in no table: write it below one of {known}.")
        if table not in TABLES:
            raise InputError(f"{path}: the table [{table}] is unknown{_near(table, TABLES)}.")
        settings = {one.key: one for one in settings_of(TABLES[table])}
        for key, value in values.items():
            if key not in settings:
                _refuse_code(path, key)
                raise InputError(f"{path}: [{table}] {key} is unknown{_near(key, settings)}.")
            found[table, key] = settings[key].from_file(value, f"{path}: [{table}] {key}")
    return found


def _refuse_code(path: Path, key: str) -> None:
    if key.replace("_", "-") == "trust-remote-code":
        raise InputError(
            f"{path}: {key} would let a file run code: say --trust-remote-code on the command line."
        )


def _near(name: str, known: Iterable[str]) -> str:
    return f"; the nearest known one is {difflib.get_close_matches(name.lower(), known, 1, 0)[0]}"
