"""The bounds of a comparison: none by default, factors of at least 1, on the command line and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.settings import DiffBounds
from nbl_export.settings.file import read_settings

NAMES = ("max_ppl_increase", "max_slowdown", "max_size_increase")


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_below_one_is_refused(name: str) -> None:
    DiffBounds(**{name: 1.0}).check()
    with pytest.raises(InputError) as told:
        DiffBounds(**{name: 0.99}).check()
    assert (
        str(told.value) == f"--{name.replace('_', '-')} is 0.99; it must be 1 or more (1.05 allows 5 % more)."
    )


def test_they_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "nbl-export.toml"
    path.write_text("[diff]\nmax-ppl-increase = 1.02\nmax-slowdown = 1\n")
    found = read_settings(path)
    assert found == {("diff", "max-ppl-increase"): 1.02, ("diff", "max-slowdown"): 1.0}
    path.write_text("[diff]\nmax-slow = 1\n")
    with pytest.raises(
        InputError, match=r"\[diff\] max-slow is unknown; the nearest known one is max-slowdown"
    ):
        read_settings(path)
