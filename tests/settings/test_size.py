"""Sizes in words, and what is none."""

from __future__ import annotations

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.settings.definition import bytes_of


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        ("1tib", 1 << 40),
        ("64kB", 64_000),
        ("7KiB", 7168),
    ],
)
def test_a_size_is_so_many_bytes(size: str, found: int) -> None:
    assert bytes_of(size) == found
    api.CalibrateSettings(memory=size).check()


@pytest.mark.parametrize(
    "size",
    ["4", "GiB", "-1GiB", "4 gigabytes", "4Gi", "1e3MB", "0MB", "0.0GiB", "9" * 40 + "GB", "nan"],
)
def test_anything_else_is_refused(size: str) -> None:
    with pytest.raises(InputError, match=r"--memory is .*; give a size, as 4GiB or 500MB\.$"):
        api.CalibrateSettings(memory=size).check()
