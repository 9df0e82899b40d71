"""The tokenizer of the tiny model, for what reads text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(find_model(str(tiny_folder)))
