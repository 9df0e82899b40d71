"""The graph on the probe: what is fed, what depends on it, and errors that few large tokens do not hide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.probe_runner import ProbeRunner, cause_and_remedy, relative_error
from nbl_export.rewrite.prove import PROOF_TOLERANCE
from tests.fixtures_graph import plan_by_hand

REAL = np.array([[3.0, 4.0], [0.0, 1.0], [2.0, 2.0]], dtype=np.float32)


@pytest.fixture
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, (1, 3))


def layer(path: Path, index: int) -> AttentionRegion:
    region = find_regions(load_graph(path))[index]
    assert isinstance(region, AttentionRegion)
    return region


def test_what_is_fed_replaces_all_that_comes_before(stories_out: Path, plan: Plan) -> None:
    path = stories_out / "baseline" / "model.onnx"
    region = layer(path, 2)
    runner = ProbeRunner(path, plan)
    u, y = str(region.x.name), str(region.y.name)
    (own, *_), rows = runner.run([u, y], {}), runner.run([u], {})
    given = {u: runner.split(plan.probe_u[2], [row[u].shape for row in rows])}
    fed = [runner.run([y], given, other_tokens=other) for other in (False, True)]
    assert all(np.array_equal(a[y], b[y]) for a, b in zip(*fed, strict=True))
    np.testing.assert_allclose(fed[0][0][y], own[y], atol=1e-4)
    # Of the graph's input alone, other tokens are something else.
    other = runner.run([y], {}, other_tokens=True)
    assert not np.allclose(other[0][y], own[y], atol=0.1)


def test_moved_weights_give_other_tensors(baseline_in: Callable[[str], Path], plan: Plan) -> None:
    path = baseline_in("int4")
    y = str(layer(path, 2).y.name)
    runner = ProbeRunner(path, plan)
    once, again = runner.run([y], {}), runner.run([y], {}, nudged=0)
    moved = runner.error([row[y] for row in again], runner.joined([row[y] for row in once]))
    assert 0.02 < moved < 0.7


# relative_error ----------------------------------------------------------------------------------


def test_relative_error_by_hand() -> None:
    assert relative_error(REAL.copy(), REAL) == 0.0
    # ‖REAL‖² = 9 + 16 + 0 + 1 + 4 + 4 = 34; one entry is off by 1.
    off = REAL.copy()
    off[1, 0] = 1.0
    assert relative_error(REAL, off) == pytest.approx(1 / 35**0.5)
    # Every token is off by 1 or more times itself, and the middle one by that: √(1/34) overall, 1 in the median.
    assert relative_error(2 * REAL, REAL) == pytest.approx(1.0)
    assert relative_error(np.zeros_like(REAL), REAL) == pytest.approx(1.0)


def test_a_massive_token_hides_nothing() -> None:
    """Neighbouring layers of SmolLM2: 0.006 to 0.02 apart overall, where one token is a hundred times the others."""
    generator = np.random.default_rng(0)
    h = generator.standard_normal((40, 64)).astype(np.float32)
    h[0] *= 300
    after = h + 0.25 * generator.standard_normal(h.shape).astype(np.float32)
    after[0] = h[0] * 1.001
    overall = np.linalg.norm(after - h) / np.linalg.norm(h)
    assert overall < PROOF_TOLERANCE["fp16"].u
    assert relative_error(after, h) > PROOF_TOLERANCE["bf16"].u
    # One wrong token of forty is still seen by the norm of all.
    wrong = h.copy()
    wrong[0] = h[1]
    assert relative_error(wrong, h) > 0.9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_relative_error_is_infinite_for_what_is_no_number(bad: float) -> None:
    found, expected = REAL.copy(), REAL.copy()
    found[1, 0] = bad
    expected[2, 1] = bad
    assert relative_error(found, REAL) == float("inf")
    assert relative_error(REAL, expected) == float("inf")
    assert not relative_error(found, REAL) <= PROOF_TOLERANCE["fp32"].u


def test_a_graph_that_routes_tokens_says_what_rounding_may_do() -> None:
    routed = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[2, 4] x, int64[1] k) => (float[2, 1] v, int64[2, 1] i) '
        "{ v, i = TopK (x, k) }"
    )
    plain = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
    )
    assert "rounding may send tokens to other experts" in cause_and_remedy(routed, "fp16", told=False)
    for model, precision, told in (
        (routed, "fp32", False),
        (routed, "fp16", True),
        (plain, "fp16", False),
    ):
        assert cause_and_remedy(model, precision, told).startswith(
            "this graph is not of the model the plan was made for"
        )
