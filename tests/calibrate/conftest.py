"""The tiny model and its tokenizer, and the moments of rows that an undisturbed run collects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import Moments
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import find_model

ROWS, LENGTH, BLOCKS = 30, 128, 4  # four batches of about a thousand tokens, the last one short


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(model: Any, tokens: np.ndarray) -> Moments:
    """The moments of an uninterrupted run of one process, with all states in memory."""
    return collect_moments(model, tokens)
