"""Parity of a mixture of experts in half precision: with the graph's choices, which have a gate of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbl_export.graph.io import scratch_copy
from nbl_export.models.routers import Routers
from nbl_export.report.tables import parity_table
from nbl_export.verify import decoder as module
from nbl_export.verify.decoder import measure_parity
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.parity.figures import Routing
from nbl_export.verify.parity.routing import passes, routing_failures, routing_of
from tests.experts import Experts, swap_experts
from tests.verify.measured import with_fault


@pytest.fixture(scope="module")
def rewritten(experts: Experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.rewritten("fp16", tmp_path_factory.mktemp("rewritten"))


def test_the_graphs_choices_are_taken_and_said(
    experts: Experts, rewritten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, found = experts.verified("fp16", rewritten), Measurement()
    parity = measure_parity(case, found)
    assert [check.status for check in found.checks] == ["passed"]
    routing = parity.routing
    assert routing is not None and routing.differing > 10 and 0 < routing.worst < 1
    # Every token of every pass at each of the three routers.
    assert routing.choices == 3 * sum(step.tokens for step in parity.steps)
    assert f"{routing.differing:,} of {routing.choices:,} choices of experts" in parity_table(parity).note
    # Without them, the figures are those of other experts.
    monkeypatch.setattr(module, "routers", lambda _model: [])
    untold = measure_parity(case, found)
    assert untold.routing is None and found.checks[1].status == "failed"
    assert untold.mean_abs > 10 * parity.mean_abs


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_wrong_layers_fail(experts: Experts, rewritten: Path, tmp_path: Path, name: str) -> None:
    path = with_fault(
        rewritten, tmp_path, "layers.1.", f"nbl_linear.{name}", 1.1 if name == "weight" else 0.0
    )
    found = Measurement()
    measure_parity(experts.verified("fp16", path), found)
    (check,) = found.checks
    assert check.status == "failed" and "the linear layer 1 differs" in check.detail


def test_tokens_that_go_to_wrong_experts_fail_by_their_scores(experts: Experts, rewritten: Path) -> None:
    found = Measurement()
    with scratch_copy(rewritten, swap_experts) as wrong:
        parity = measure_parity(experts.verified("fp16", wrong), found)
    assert parity.routing is not None and parity.routing.worst > 10
    assert "to experts whose scores fall short by" in found.checks[0].detail


def test_passes_are_padded_as_streams_pad_them() -> None:
    rows = [np.zeros(n, np.int32) for n in (4, 3)]
    first, step, alone, last = passes(rows, 1, True, [rows[1]])
    assert first.tolist() == [[True, True, True], [False, True, True]]
    assert passes(rows, 1, True, left=False)[0].tolist() == [[True, True, True], [True, True, False]]
    assert step.shape == (2, 1) and alone.shape == (1, 2) and last.shape == (1, 1)
    assert passes(rows, 1, False)[1].tolist() == [[True] * 4, [False, True, True, True]]


def test_a_choice_is_judged_by_what_rounding_moves() -> None:
    import torch

    real, scores = [np.ones((1, 2), bool)], torch.tensor([[4.0, 3.0], [1.0, 2.0]])

    def ran(told: list[list[np.ndarray]] | None) -> Routers:  # type: ignore[type-arg]
        routers = Routers(real, told)
        with routers:
            routers.begin()
            scores.topk(1)
        return routers

    own, told = ran(None), ran([[np.array([[1], [1]])]])
    found = routing_of(own, told, [0.5])
    assert found == Routing(2, 1, pytest.approx(1 / 0.75)) and "by 1.33 times" in routing_failures(found)[0]
    assert routing_failures(routing_of(own, told, [1.0])) == []
    assert routing_of(own, told, []).worst > 100  # of float32
    assert routing_of(own, as_own(own), [0.5]) == Routing(2, 0, 0)


def as_own(own: Routers) -> Routers:
    routers = Routers(own.real, own.chosen())
    routers.passes = own.passes
    return routers
