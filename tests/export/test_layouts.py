"""Each layout names both graphs, each in a place of its own."""

from __future__ import annotations

import pytest

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.export.layouts import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_both_graphs_lie_apart(layout: str, precision: str) -> None:
    found = [LAYOUTS[layout].names(role, precision) for role in (LINEARIZED, BASE)]
    assert len({graph for graph, _ in found}) == 2
    files = {f"{graph.rpartition('/')[0]}/{name}" for graph, data in found for name in (graph, data)}
    assert len(files) == 4, "no two files are one"
