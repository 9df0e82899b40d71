"""Read ``nbl-export.toml``: settings in a file, one table for each command.

[select]
k = 8
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import TomlError, read_table
from nbl_export.settings import graphs, making, measuring
from nbl_export.settings.definition import Setting, Settings, settings_of

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


def read_settings(path: Path) -> dict[tuple[str, str], list[str]]:
    """What a file sets, by table and key, each as words of the command line, all of them checked.

    Raises :class:`InputError` for a file that cannot be read, an unknown table or key, and a value that is refused.
    """
    try:
        raw = read_table(path)
    except OSError as error:
        raise os_error_in_words(error, "reading --config") from None
    except (TomlError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {str(error).rstrip('.')}.") from None
    found = {}
    for table, values in raw.items():
        if table not in TABLES or not isinstance(values, dict):
            raise InputError(f"{path}: {_refused(table, TABLES)}; settings stand in tables, as [select].")
        settings = {one.key: one for one in settings_of(TABLES[table])}
        for key, value in values.items():
            if key not in settings:
                raise InputError(f"{path}: [{table}] {_refused(key, settings)}.")
            found[table, key] = _words(settings[key], value, f"{path}: [{table}] {key}")
    return found


def _words(one: Setting, value: Any, name: str) -> list[str]:
    """A value of a file as words of the command line; raises :class:`InputError`, beginning with ``name``."""
    if isinstance(value, bool) is not (one.kind is bool) or (isinstance(value, list) and not one.many):
        raise InputError(f"{name} is {json.dumps(value, default=str)}, which is no such value.")
    if one.kind is bool:
        return [str(value).lower()]
    words = [str(each) for each in (value if isinstance(value, list) else [value])]
    words = words if one.repeated and words else [",".join(words)]
    one.check(one.of_words(words, name), name, of_file=True)
    return words


def _refused(key: str, known: Iterable[str]) -> str:
    """Why a key, or what it is, that is not ``known`` is refused."""
    if key.replace("_", "-") == "trust-remote-code":
        return f"{key} would let a file run code: say --trust-remote-code on the command line"
    near = difflib.get_close_matches(key.lower(), known, 1, 0)[0]
    return f"{key} is unknown; the nearest known one is {near}"
