"""TOML tables shipped with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_table(path: Path) -> dict[str, Any]:
    """The tables of one of the package's TOML files."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
