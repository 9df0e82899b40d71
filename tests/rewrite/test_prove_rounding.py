"""Proofs in every precision: other weights than the plan's, and the stream of a neighbouring layer, are refused."""

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
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.prove import PROOF_TOLERANCE, prove
from nbl_export.rewrite.replace import proven_regions
from tests.fixtures_graph import plan_by_hand
from tests.precisions import PRECISIONS

# The relative noise of all weights, of those of the attention, and of the MLPs: refused from there on.
REFUSED_FROM = {"fp16": 2e-3, "bf16": 2e-2, "int8": 1e-2, "int4": 0.1, "int4-qdq": 0.1}


def noised(model: Any, plan: Plan, level: float, which: str) -> Plan:
    """The plan of another fine-tune: the model's weights, all or those named ``which``, with noise."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for name, weight in other.named_parameters():
        if weight.ndim == 2 and which in name and "embed" not in name and "lm_head" not in name:
            weight.mul_(1 + level * torch.randn(weight.shape, generator=generator))
    probe = probe_inputs(other, plan.probe)
    return replace(plan, probe_u=probe.x, probe_y=probe.y)


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, (1, 3))


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


@pytest.mark.parametrize("which", ["", "self_attn", "mlp"])
@pytest.mark.parametrize("name", REFUSED_FROM)
def test_another_fine_tune_is_refused(
    baseline_in: Callable[[str], Path], stories_model: Any, plan: Plan, name: str, which: str
) -> None:
    other = noised(stories_model, plan, REFUSED_FROM[name], which)
    with pytest.raises(BuildError, match="not proven") as caught:
        proven_regions(baseline_in(name), other)
    assert "not of the model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("step", [-1, 1])
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
