"""What a session takes, from its files; and whether it fits into what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.runtime import sizes


@pytest.mark.parametrize(("name", "times"), [("fp32", 2), ("bf16", 3)])
def test_a_session_takes_its_files_and_a_copy(
    tiny_graph: Path, tmp_path: Path, name: str, times: int
) -> None:
    path = tmp_path / "model.onnx"
    model = load_graph(tiny_graph)
    to_precision(model, PRECISIONS[name], {})
    files = save_graph(model, path)
    assert sizes.session_bytes(path) == times * sum(file.stat().st_size for file in files)


def test_sessions_fit_beside_each_other_with_some_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "free", lambda: 100)
    assert sizes.fit(90) and sizes.fit(50, 40) and not sizes.fit(91) and not sizes.fit(50, 41)
