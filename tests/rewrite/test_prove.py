"""Proof against PyTorch's activations: what is wrong is refused, what is broken too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.graph.summary import ProofErrors
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.prove import PROOF_TOLERANCE, Proof, prove
from tests.fixtures_graph import plan_by_hand


@pytest.fixture(scope="module")
def graph(stories_out: Path) -> Path:
    return stories_out / "baseline" / "model.onnx"


@pytest.fixture(scope="module")
def regions(graph: Path) -> list[AttentionRegion]:
    return [r for r in find_regions(load_graph(graph)) if isinstance(r, AttentionRegion)]


def prove_all(graph: Path, regions: list[AttentionRegion], plan: Plan) -> dict[int, Proof]:
    return prove(graph, load_graph(graph), regions, plan)


@pytest.fixture
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, (1, 3))


@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_every_layer_of_the_right_model_is_proven(
    stories_out: Path, graph: Path, regions: list[AttentionRegion], fit_input: Any
) -> None:
    proofs = prove_all(graph, regions, plan_by_hand(stories_out, (1, 3), fit_input))
    assert sorted(proofs) == [0, 1, 2, 3, 4]
    for proof in proofs.values():
        # Float32 against float32: not zero, and far below the tolerance.
        assert max(proof.input_error, proof.output_error) < 1e-5
        assert proof.holds(PROOF_TOLERANCE["fp32"])
    kept = [p.errors for p in proofs.values()]
    assert (
        kept == [ProofErrors(p.layer, p.input_error, p.output_error) for p in proofs.values()]
        and len(kept) == 5
    )


@pytest.mark.parametrize("which", ["probe_u", "probe_y"])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda rows: rows[::-1].copy(), id="another token's"),
        pytest.param(lambda rows: rows * np.float32(1.01), id="one percent off"),
        pytest.param(lambda rows: np.where(np.arange(len(rows))[:, None] == 3, np.nan, rows), id="a NaN"),
        pytest.param(lambda rows: np.where(np.arange(len(rows))[:, None] == 0, np.inf, rows), id="infinite"),
        pytest.param(lambda rows: rows[1:], id="a token short"),
        pytest.param(lambda rows: rows[:, :-1], id="another width"),
    ],
)
def test_wrong_activations_are_refused(
    graph: Path, regions: list[AttentionRegion], plan: Plan, which: str, wrong: Any
) -> None:
    probes = dict(getattr(plan, which))
    probes[3] = wrong(probes[3])
    with pytest.raises(BuildError, match=r"Layer 3 is not proven.*\(input\).*\(output\)") as caught:
        prove_all(graph, regions, replace(plan, **{which: probes}))
    assert "\n" not in str(caught.value)


def test_input_and_output_of_the_normed_fit_are_not_those_of_the_residual_one(
    stories_out: Path, graph: Path, regions: list[AttentionRegion], plan: Plan
) -> None:
    residual = plan_by_hand(stories_out, (1, 3), "residual")
    with pytest.raises(BuildError, match="Layer 1 is not proven"):
        prove_all(graph, regions, replace(plan, probe_u=residual.probe_u))


def test_a_layer_that_stays_need_not_be_proven(
    graph: Path, regions: list[AttentionRegion], plan: Plan
) -> None:
    probes = dict(plan.probe_y)
    probes[2] = -probes[2]
    proofs = prove_all(graph, regions, replace(plan, probe_y=probes))
    assert not proofs[2].holds(PROOF_TOLERANCE["fp32"]) and proofs[2].output_error == pytest.approx(
        2, abs=1e-4
    )
    assert all(proofs[i].holds(PROOF_TOLERANCE["fp32"]) for i in (0, 1, 3, 4))


def test_a_planned_layer_without_a_stream_is_refused(
    stories_out: Path, graph: Path, regions: list[AttentionRegion]
) -> None:
    plan = plan_by_hand(stories_out, (1, 3), "residual")
    without = [replace(r, streams=()) if r.layer == 1 else r for r in regions]
    with pytest.raises(BuildError, match="Layer 1 is not proven"):
        prove_all(graph, without, plan)


# relative_error ----------------------------------------------------------------------------------
