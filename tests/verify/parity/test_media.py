"""Parity on texts with images: what is right passes, and what has other embeddings or positions does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nbl_export.batch import FIRST
from nbl_export.export.forms import FORMS, embedding_form, reading_embeds
from nbl_export.export.torch import export_torch
from nbl_export.graph.embedding import NAME
from nbl_export.graph.io import scratch_copy
from nbl_export.models.attention import Routers
from nbl_export.models.media_tokens import MediaTokens
from nbl_export.report.tables import parity_table
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.verify import measure as module
from nbl_export.verify.case import Measurement
from nbl_export.verify.measure import decoder_parity, media_parity, rows_with_media
from nbl_export.verify.parity.compare import Text
from nbl_export.verify.parity.figures import Routing, gates_for
from nbl_export.verify.parity.pytorch import routing_failures, routing_of
from tests.conftest import exhaustive
from tests.experts import Experts, swap_experts
from tests.families import WIDTH, Calibrated
from tests.verify.measured import with_fault


def of_two_by_two() -> MediaTokens:
    """Two images of 2 x 2, seen in both directions."""
    features = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32) * 0.3
    offsets = np.tile([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], (2, 1)).astype(np.int32)
    steps = np.tile([0, 0, 0, 2], 2).astype(np.int32)
    return MediaTokens(
        features=features,
        later=np.zeros((8, 0, WIDTH), np.float32),
        offsets=offsets,
        steps=steps,
        block=np.repeat([0, 1], 4).astype(np.int32),
        stand_in=np.zeros(8, np.int32),
        both_ways=np.ones(1, np.int32),
    )


def test_rows_go_on_after_their_first_image() -> None:
    heldout = np.arange(3 * 90, dtype=np.int32).reshape(3, 90) % 200
    heldout[1, 20:24] = heldout[1, 50:54] = FIRST + np.arange(4)
    heldout[2, 86:90] = FIRST + np.arange(4)
    assert [len(row) for row in rows_with_media(heldout)] == [24 + 32, 90]
    assert rows_with_media(heldout[:1]) == []


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen2.5-vl", "static"),
        pytest.param("gemma3", "shared", marks=exhaustive),
        pytest.param("gemma4", "concat", marks=exhaustive),
    ],
)
def test_right_and_wrong(
    name: str,
    form: str,
    wrapper: Callable[[str], Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, images = wrapper(name), of_two_by_two()
    if name != "qwen2.5-vl":
        images = replace(images, offsets=images.offsets[:, :1] * 0, steps=images.steps * 0 + 1)
    export_torch(case.model, tmp_path / NAME, form=embedding_form(case.model))
    baseline, graph = tmp_path / "baseline" / "model.onnx", tmp_path / "model.onnx"
    export_torch(case.model, baseline, form=reading_embeds(FORMS[form], case.model))
    plan = case.plan((2,))
    rewrite_file(baseline, plan, graph)
    rows = [np.random.default_rng(i).integers(3, 250, 30).astype(np.int32) for i in range(2)]
    rows[0][5:9], rows[1][12:16] = FIRST + np.arange(4), FIRST + 4 + np.arange(4)
    gates = gates_for("float32")
    assert media_parity(case.model, plan, graph, rows, images, gates).failures() == []
    assert media_parity(case.model, plan, baseline, rows, images, gates).failures()

    plain = module._by_graph
    wrong = {"features": images.features + 1e-2}
    if name.startswith("qwen"):
        wrong["offsets"] = images.offsets * 0
        wrong["steps"] = images.steps + 1
    if name == "gemma4":
        wrong["stand_in"] = images.stand_in + 5
    for field, value in wrong.items():
        other = replace(images, **{field: value})
        monkeypatch.setattr(module, "_by_graph", lambda d, r, _i, other=other: plain(d, r, other))
        assert media_parity(case.model, plan, graph, rows, images, gates).failures(), field


@pytest.fixture(scope="module")
def rewritten(experts: Experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.rewritten("fp16", tmp_path_factory.mktemp("rewritten"))


def test_the_graphs_choices_are_taken_and_said(
    experts: Experts, rewritten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, found = experts.verified("fp16", rewritten), Measurement()
    parity = decoder_parity(case, found)
    assert [check.status for check in found.checks] == ["passed"]
    routing = parity.routing
    assert routing is not None and routing.differing > 10 and 0 < routing.worst < 1
    # Every token of every pass at each of the three routers.
    assert routing.choices == 3 * sum(step.tokens for step in parity.steps)
    assert f"{routing.differing:,} of {routing.choices:,} choices of experts" in parity_table(parity).note
    # Without them, the figures are those of other experts.
    monkeypatch.setattr(module, "routers", lambda _model: [])
    untold = decoder_parity(case, found)
    assert untold.routing is None and found.checks[1].status == "failed"
    assert untold.mean_abs > 10 * parity.mean_abs


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_wrong_layers_fail(experts: Experts, rewritten: Path, tmp_path: Path, name: str) -> None:
    path = with_fault(
        rewritten, tmp_path, "layers.1.", f"nbl_linear.{name}", 1.1 if name == "weight" else 0.0
    )
    found = Measurement()
    decoder_parity(experts.verified("fp16", path), found)
    (check,) = found.checks
    assert check.status == "failed" and "the linear layer 1 differs" in check.detail


def test_tokens_that_go_to_wrong_experts_fail_by_their_scores(experts: Experts, rewritten: Path) -> None:
    found = Measurement()
    with scratch_copy(rewritten, swap_experts) as wrong:
        parity = decoder_parity(experts.verified("fp16", wrong), found)
    assert parity.routing is not None and parity.routing.worst > 10
    assert "to experts whose scores fall short by" in found.checks[0].detail


def test_passes_are_padded_as_streams_pad_them() -> None:
    rows = [np.zeros(n, np.int32) for n in (4, 3)]
    first, step, alone, last = Text(rows, 1, [rows[1]]).real()
    assert first.tolist() == [[True, True, True], [False, True, True]]
    assert Text(rows, 1).real(left=False)[0].tolist() == [[True, True, True], [True, True, False]]
    assert step.shape == (2, 1) and alone.shape == (1, 2) and last.shape == (1, 1)
    assert Text(rows, 1, cached=False).real()[1].tolist() == [[True] * 4, [False, True, True, True]]


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
