"""Right activations are proven, in half precision too, and wrong ones are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate.probe import probe_inputs
from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.graph.summary import ProofErrors
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.prove import PROOF_TOLERANCE, Proof, prove
from nbl_export.rewrite.replace import proven_regions
from tests.fixtures_graph import plan_by_hand
from tests.precisions import PRECISIONS


@pytest.fixture(scope="module")
def graph(stories_out: Path) -> Path:
    return stories_out / "baseline" / "model.onnx"


@pytest.fixture(scope="module")
def regions(graph: Path) -> list[AttentionRegion]:
    return [r for r in find_regions(load_graph(graph)) if isinstance(r, AttentionRegion)]


def prove_all(graph: Path, regions: list[AttentionRegion], plan: Plan) -> dict[int, Proof]:
    return prove(graph, load_graph(graph), regions, plan)


@pytest.fixture(scope="module")
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


# The relative noise of all weights, of those of the attention, and of the MLPs: refused from there on.

# The relative noise of the weights from which on another model is refused.
REFUSED_FROM = {"fp16": 2e-3, "bf16": 2e-2, "int8": 1e-2, "int4": 0.1, "int4-qdq": 0.1}


def noised(model: Any, plan: Plan, level: float, which: str) -> Plan:
    """The plan of another fine-tune: the model's weights, all or those named ``which``, with noise."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for name, weight in other.named_parameters():
        if weight.ndim == 2 and which in name and "embed" not in name and "lm_head" not in name:
            weight.mul_(1 + level * torch.randn(weight.shape, generator=generator))
    probe = probe_inputs(other, plan.probe)
    return replace(plan, probe_u=probe.x, probe_y=probe.y)


@pytest.mark.parametrize("name", REFUSED_FROM)
def test_a_right_graph_is_proven_within_what_its_rounding_explains(
    baseline_in: Callable[[str], Path], plan: Plan, name: str
) -> None:
    proofs = proven_regions(baseline_in(name), plan).proofs
    flat = PROOF_TOLERANCE[name.partition("-")[0]]
    for proof in proofs.values():
        assert proof.holds(flat) and proof.allowed.y < flat.y
        # The measure is of the right size: neither a blank cheque nor a matter of luck.
        assert 0.3 < proof.output_error / proof.allowed.y < 1
        assert proof.layer == 0 or 0.2 < proof.input_error / proof.allowed.u < 1


@pytest.mark.parametrize(
    ("name", "which"),
    [(n, w) for i, n in enumerate(REFUSED_FROM) for w in ("", ("self_attn", "mlp")[i % 2])],
)
def test_another_fine_tune_is_refused(
    baseline_in: Callable[[str], Path], stories_model: Any, plan: Plan, name: str, which: str
) -> None:
    other = noised(stories_model, plan, REFUSED_FROM[name], which)
    with pytest.raises(BuildError, match="not proven") as caught:
        proven_regions(baseline_in(name), other)
    assert "not of the model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "step"), [(n, (-1, 1)[i % 2]) for i, n in enumerate(PRECISIONS)])
def test_the_stream_of_the_next_layer_is_not_this_ones(
    baseline_in: Callable[[str], Path], stories_out: Path, name: str, step: int
) -> None:
    """Also if its values were the same in every digit: y does not come out of what is fed there."""
    path, plan = baseline_in(name), plan_by_hand(stories_out, (2,), "residual")
    model = load_graph(path)
    regions = [r for r in find_regions(model) if isinstance(r, AttentionRegion)]
    other = [replace(r, streams=regions[2 + step].streams[:1]) if r.layer == 2 else r for r in regions]
    assert prove(path, model, regions, plan)[2].u is regions[2].streams[0]
    with pytest.raises(BuildError, match="Layer 2 is not proven"):
        prove(path, model, other, plan)
    if step == 1:  # y is computed from the stream before it, not from the one after it
        same = replace(plan, probe_u={**plan.probe_u, 2: plan.probe_u[3]})
        with pytest.raises(BuildError, match="Layer 2 is not proven"):
            prove(path, model, other, same)


@pytest.mark.parametrize("name", ["int4", "int4-qdq", "bf16"])
def test_activations_one_token_late_are_refused(
    baseline_in: Callable[[str], Path], plan: Plan, name: str
) -> None:
    late = {i: np.roll(u, 1, axis=0) for i, u in plan.probe_u.items()}
    with pytest.raises(BuildError, match="not proven"):
        proven_regions(baseline_in(name), replace(plan, probe_u=late))
