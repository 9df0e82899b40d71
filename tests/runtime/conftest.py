"""A rewritten graph that several of these files read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.rewrite.replace import rewrite_file
from tests.fixtures_graph import plan_by_hand


@pytest.fixture(scope="session")
def rewritten(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K without the attention of layers 0 and 3."""
    path = tmp_path_factory.mktemp("rewritten") / "model.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan_by_hand(stories_out, (0, 3)), path)
    return path
