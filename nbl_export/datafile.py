"""Tables that are shipped with the package, as TOML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file of ours."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
