"""Sizes in words: 4GiB, 500MB."""

from __future__ import annotations

import re

from nbl_export.settings.definition import Must

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT])(i?)B", re.IGNORECASE)


def bytes_of(size: str) -> int:
    """The bytes of a ``size`` such as 4GiB or 500MB; raises ``ValueError`` for anything else."""
    found = _SIZE.fullmatch(size)
    if found is None:
        raise ValueError(size)
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def _is_size(size: str) -> bool:
    try:
        return bytes_of(size) > 0
    except ValueError:
        return False


SIZE = Must(_is_size, "is {value!r}; give a size, as 4GiB or 500MB")
