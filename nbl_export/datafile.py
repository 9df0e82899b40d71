"""Tables in TOML: those that are shipped with the package, and a user's settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TomlError = tomllib.TOMLDecodeError


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises :data:`TomlError` for one that is not TOML."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
