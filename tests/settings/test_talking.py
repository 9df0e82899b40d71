"""What generate can be asked."""

from __future__ import annotations

import pytest

from nbl_export.errors import InputError
from nbl_export.settings import GenerateSettings


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (GenerateSettings(graph="other"), "--graph 'other' is unknown; choose one of linearized, base, both"),
        (GenerateSettings(max_tokens=0), "--max-tokens is 0; it must be at least 1"),
        (GenerateSettings(temperature=-0.1), "--temperature is -0.1; it must be at least 0"),
        (GenerateSettings(top_p=0.0), "--top-p is 0; it must be more than 0 and at most 1"),
        (GenerateSettings(top_p=1.01), "--top-p is 1.01; it must be more than 0 and at most 1"),
        (GenerateSettings(seed=-1), "--seed is -1; it must be at least 0"),
        (GenerateSettings(raw=True, system="x"), "--raw uses no chat template, and --system is a part of it"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: GenerateSettings, message: str) -> None:
    with pytest.raises(InputError) as caught:
        asked.check()
    assert str(caught.value).startswith(message)
