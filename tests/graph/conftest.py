"""Graphs whose weights lie in files beside them, in every place a tensor may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.graph.external_data import nested_graph, two_file_graph


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    return two_file_graph(tmp_path / "source")


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    return nested_graph(tmp_path / "nested")
