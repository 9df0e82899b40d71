"""Routers of a graph: found, and told what to take."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.graph.routers import places_of, routers, scores_of, tell, told_ranks
from nbl_export.runtime.intermediates import compute_tensors

SCORES = np.array([[4.0, 3.0, 1.0], [5.0, 1.0, 2.0]], np.float32)


def graph(axis: int = -1, shape: str = "n, 3") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[{shape}] s, int64[1] k) => (float[a, b] w) '
        f"{{ v, i = TopK <axis = {axis}> (s, k) w = Add (v, v) }}"
    )


def test_a_router_is_found_with_its_scores_and_places() -> None:
    (router,) = routers(graph())
    assert (scores_of(router), places_of(router)) == ("s", "i")


def test_places_that_are_fed_are_weighed_by_the_graphs_own_scores() -> None:
    model = graph()
    tell(model)
    feeds = {"s": SCORES, "k": np.array([2]), "i": np.array([[2, 0], [1, 2]])}
    (found,) = compute_tensors(model, ["w"], [feeds])
    assert found["w"].tolist() == [[2, 8], [2, 4]]


@pytest.mark.parametrize(
    ("routes", "model", "ranks"),
    [
        ({0: (2, 2)}, graph(), {"i": 2}),
        ({0: (2, 2)}, graph(shape="1, n, 3"), {"i": 3}),
        ({0: (2, 2)}, graph(axis=0), {}),
        ({0: (2, 2), 1: (2, 2)}, graph(), {}),
        ({1: (2, 2)}, graph(), {}),
        ({}, graph(), {}),
        ({0: (2, 4, 2)}, graph(), {}),
    ],
)
def test_all_are_told_or_none(
    routes: dict[int, tuple[int, ...]], model: ir.Model, ranks: dict[str, int]
) -> None:
    assert told_ranks(model, {n: np.zeros(s, np.int64) for n, s in routes.items()}) == ranks
