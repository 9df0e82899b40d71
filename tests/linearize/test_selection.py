"""What choosing layers found, as it is kept: curves in the order of K, and what was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.selection import Curve, CurvePoint, Loss, PlanLoss, ScoredLayer, Scores
from nbl_export.records import from_json, to_json
from nbl_export.settings import NO_BUDGET, Budget
from nbl_export.workspace import Workspace

LOSS = Loss(0.5, 0.1, 0.2, 0.02)
POINTS = tuple(CurvePoint.of(range(k), replace(LOSS, kl=0.1 * (9 - k))) for k in (3, 1, 4, 2))
SCORES = Scores(
    (
        ScoredLayer(0, 0.5, 2.0, 1e-6, 1e-6),
        ScoredLayer(2, 0.25, 1.0, 1e-6, 1e-6, kl=0.1, kind="sliding window"),
    ),
    {"1": "state space"},
    Curve(POINTS, 2, Budget(max_kl=0.5), 512, 4096, 12),
    PlanLoss(0.1, LOSS, None, {"2": 0.01}, LOSS),
    "bfloat16",
)


def back(scores: Scores) -> Scores:
    raw = json.loads(json.dumps(to_json(scores), allow_nan=False))
    return from_json(Scores, raw, "it", "do it again")


def test_a_curve_is_read_by_k_in_whatever_order_it_was_measured() -> None:
    curve = Curve(POINTS)
    assert [p.k for p in curve.by_k] == [1, 2, 3, 4]
    # The losses of this one fall: it is K that orders them, and the points stay as they were.
    assert [p.layers for p in curve.by_k] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert curve.points == POINTS and Curve(()).by_k == []
    assert (curve.budget, curve.chosen) == (NO_BUDGET, None)


def test_scores_come_back_from_json() -> None:
    assert back(SCORES) == SCORES
    bare = Scores(SCORES.candidates)
    assert back(bare) == bare and (bare.others, bare.curve, bare.result) == ({}, None, None)


def test_nothing_chosen_is_not_nothing_measured() -> None:
    """K = 0 is a choice, and a budget of 0 nats is a bound."""
    assert SCORES.curve is not None
    for chosen, budget in ((0, Budget(max_kl=0.0)), (None, NO_BUDGET)):
        found = back(replace(SCORES, curve=replace(SCORES.curve, chosen=chosen, budget=budget)))
        assert found.curve is not None
        assert (found.curve.chosen, found.curve.budget) == (chosen, budget)


def test_a_layer_whose_kind_was_not_kept_sees_everything() -> None:
    raw = to_json(SCORES)
    del raw["candidates"][0]["kind"]
    assert from_json(Scores, raw, "it", "do it again") == SCORES


@pytest.mark.parametrize(
    "damage", [{"candidates": [{"layer": 0}]}, {"curve": {"points": 3}}, {"more": 1}], ids=str
)
def test_damaged_scores_are_refused(damage: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"it is damaged .*: do it again"):
        from_json(Scores, {**to_json(SCORES), **damage}, "it", "do it again")


def test_a_run_keeps_the_scores_of_every_layer_and_chooses_the_best(stories_out: Path) -> None:
    ws = Workspace.open(stories_out)
    scores = from_json(Scores, json.loads(ws.candidates.read_text()), "it", "do it again")
    assert [c.layer for c in scores.candidates] == [0, 1, 2, 3, 4]
    assert {c.kind for c in scores.candidates} == {"full"} and scores.others == {}
    best = sorted(scores.candidates, key=lambda c: c.cca)[:2]
    assert load_plan(ws.plan).chosen == tuple(sorted(c.layer for c in best))
