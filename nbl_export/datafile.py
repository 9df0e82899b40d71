"""Tables in TOML: those that are shipped with the package, and a user's settings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from nbl_export.files import read_bytes

TomlError = tomllib.TOMLDecodeError


_LIMIT = 1 << 20  # bytes of a file of settings


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises :data:`TomlError` for one that is not TOML.

    That includes numbers of thousands of digits and texts nested too deep.
    """
    text = read_bytes(path, _LIMIT).decode("utf-8")
    try:
        return tomllib.loads(text)
    except TomlError:
        raise
    except RecursionError:
        raise TomlError("nested too deep") from None
    except ValueError:  # Python says how to allow as many digits
        raise TomlError("a number of too many digits") from None
