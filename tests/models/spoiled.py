"""Ways to spoil a model's folder, and what a refusal must look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_last_byte(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    assert "()" not in message
    return message
