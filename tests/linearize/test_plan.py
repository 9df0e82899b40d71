"""Plans come back to the bit and nothing of them is edited unnoticed; scores, their ranking, and the choice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export.blocks import Mlp, Span
from nbl_export.calibrate.moments import LayerMoments
from nbl_export.errors import CalibrationError, InputError
from nbl_export.linearize.plan import DROPPED, LinearLayer, Plan, load_plan, ranks_of, save_plan
from nbl_export.linearize.scores import (
    CRITERIA,
    check_selection,
    predicted_excess,
    ranking,
    score_layer,
    score_layers,
    with_loss,
)
from nbl_export.linearize.selection import (
    Candidate,
    Curve,
    CurvePoint,
    Loss,
    PlanLoss,
    ScoredLayer,
    Scores,
    exp,
    keeps,
    per_saving,
)
from nbl_export.progress import Silent
from nbl_export.records import from_json, to_json
from nbl_export.settings import Budget, SelectSettings
from tests.linearize.made import make_plan
from tests.processes import Notes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_plan(tmp_path / "plan.json", make_plan())
    return tmp_path / "plan.json"


def refusal(path: Path) -> str:
    """The message with which both names of a plan are refused: one line, with a remedy."""
    messages = []
    for suffix in (".json", ".safetensors"):
        with pytest.raises(InputError) as caught:
            load_plan(path.with_suffix(suffix))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert messages[0].endswith("run `nbl-export select` again.")
    assert str(path.parent) in messages[0]
    return messages[0]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# round trip --------------------------------------------------------------------------------------


def with_a_span() -> Plan:
    plan = make_plan()
    both = {part(i): array for i, array in plan.probe_y.items() for part in (int, Mlp)}
    return replace(plan, probe_u=both, probe_y=both).with_replaced(
        {Span(1, 2): plan.layers[1], 4: plan.layers[4], 0: DROPPED}
    )


def of_rank(rank: int, *whole: int) -> Plan:
    """A plan whose layers but the ``whole`` are of this rank."""
    plan = make_plan()
    layers = {
        i: m
        if i in whole
        else LinearLayer.of_rank(np.ascontiguousarray(m.w[:, :rank]), np.ascontiguousarray(m.w[:rank]), m.b)
        for i, m in plan.layers.items()
    }
    if whole:
        return replace(plan, layers=layers, ranks=ranks_of(layers))
    return replace(plan, layers=layers, rank=rank)


def contents(plan: Plan) -> dict[str, Any]:
    found = {field.name: getattr(plan, field.name) for field in fields(Plan)}
    found["layers"] = {i: [m.w, m.b, m.up, m.down] for i, m in plan.layers.items()}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


@pytest.mark.parametrize("plan", [make_plan(), with_a_span(), of_rank(2), of_rank(2, 1)])
def test_a_plan_comes_back_by_either_name(tmp_path: Path, plan: Plan) -> None:
    save_plan(tmp_path / "plan.json", plan)
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "plan.safetensors"}
    for name in ("plan.json", "plan.safetensors"):
        loaded = load_plan(tmp_path / name)
        np.testing.assert_equal(contents(loaded), contents(plan))
        assert {m.w.dtype for m in loaded.layers.values()} == {np.dtype(np.float32)}
        assert {a.dtype for a in loaded.probe.values()} == {np.dtype(np.int64)}


def test_what_is_dropped_has_no_numbers(tmp_path: Path) -> None:
    plan = with_a_span()
    assert plan.linear == (1, 4) and plan.dropped == (0, Mlp(1), 2, Mlp(2))
    assert plan.chosen == (0, 1, Mlp(1), 2, Mlp(2), 4)
    assert plan.blocks == (0, Span(1, 2), 4)
    assert plan.linear_attention == (0, 1, 2, 4) and plan.attention_layers == (3,)
    assert {i for i, one in plan.replacements.items() if one is DROPPED} == {*plan.dropped}
    save_plan(tmp_path / "plan.json", plan)
    stored = load_file(tmp_path / "plan.safetensors")
    assert not any(name.startswith(("layers.0.", "layers.2.")) for name in stored)
    assert plan.without_layers().chosen == ()


def test_of_low_rank_the_factors_alone_are_kept(tmp_path: Path) -> None:
    plan, path = of_rank(2, 4), tmp_path / "plan.json"
    assert plan.ranks == {1: 2} and [plan.rank_of(i) for i in plan.chosen] == [2, None]
    save_plan(path, plan)
    stored = load_file(path.with_suffix(".safetensors"))
    assert {n for n in stored if n.startswith("layers.1.")} == {f"layers.1.{n}" for n in ("up", "down", "b")}
    edit_json(path, ranks={"1": 3})
    assert "was edited by hand" in refusal(path)


# damage ------------------------------------------------------------------------------------------


def test_missing_files(path: Path) -> None:
    raw = path.with_suffix(".safetensors").read_bytes()
    path.with_suffix(".safetensors").unlink()
    assert "tensors are missing" in refusal(path)
    path.with_suffix(".safetensors").write_bytes(raw)
    path.unlink()
    assert "The plan is missing" in refusal(path)


def test_truncated_or_changed_numbers(path: Path) -> None:
    weights = path.with_suffix(".safetensors")
    raw = weights.read_bytes()
    for content in (b"", raw[:-1], raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:]):
        weights.write_bytes(content)
        assert "truncated or edited" in refusal(path)


@pytest.mark.parametrize("content", ["[]", '{"format": "nbl-export/plan/2"}'])
def test_json_that_is_no_plan(path: Path, content: str) -> None:
    path.write_text(content)
    assert "is not a plan of nbl-export" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_sha256": "0" * 64},
        {"layers": [1]},
        {"layers": None},
        {"hidden_size": 7},
        {"fit_input": "residual"},
        {"model": "b" * 64},
        {"ridge": 0.01},
    ],
)
def test_an_edited_json(path: Path, changes: dict[str, Any]) -> None:
    edit_json(path, **changes)
    refusal(path)


def test_a_save_that_fails_half_way_leaves_no_mixture(path: Path) -> None:
    # The numbers are new, the JSON is old: to be refused, not read as either.
    with pytest.raises(ValueError):
        save_plan(path, replace(make_plan(seed=1), ridge=float("nan")))
    assert "does not match plan.json" in refusal(path)


# scores -------------------------------------------------------------------------------------------


def candidate(layer: int, cca: float, nmse: float) -> Candidate:
    return Candidate(layer, nmse=nmse, cca=cca, ridge=1e-6, cca_ridge=1e-6)


def measured(layer: int, cca: float, nmse: float, kl: float, drop: float, sensitivity: float) -> Candidate:
    known = candidate(layer, cca, nmse)
    return replace(known, kl=kl, drop=drop, sensitivity=sensitivity, predicted=sensitivity * nmse)


FOUR = (
    measured(0, 2.0, 0.3, kl=0.4, drop=0.6, sensitivity=9.0),
    measured(1, 9.0, 0.1, kl=0.3, drop=0.5, sensitivity=5.0),
    measured(2, 5.0, 0.2, kl=0.1, drop=0.8, sensitivity=2.0),
    measured(3, 1.0, 0.9, kl=0.2, drop=0.7, sensitivity=1.0),
)
# By hand; linearity goes by sensitivity × nmse: 2.7, 0.5, 0.4, 0.9.
BEST_FIRST = {
    "cca": [3, 0, 2, 1],
    "nmse": [1, 2, 0, 3],
    "kl": [2, 3, 1, 0],
    "drop": [1, 0, 3, 2],
    "linearity": [2, 1, 3, 0],
    "greedy": [2, 3, 1, 0],
}


def moments(noise: float, d: int = 4, n: int = 200, seed: int = 0) -> LayerMoments:
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, d))
    y = h @ rng.normal(size=(d, d)) + noise * rng.normal(size=(n, d))
    gram: dict[str, Any] = {"xx": h.T @ h, "yx": y.T @ h, "yy": y.T @ y, "hh": h.T @ h, "yh": y.T @ h}
    return LayerMoments(n=n, x=h.sum(0), h=h.sum(0), y=y.sum(0), **gram)


def scored(layers: dict[int, LayerMoments], ridge: float = 1e-6, listener: Any = None) -> Any:
    def score(some: Any) -> Any:
        return [score_layer(layers[i], i, "normed", ridge) for i in some]

    return score_layers(layers, ridge, listener or Silent(), score, 2)


# choosing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranking_puts_the_lowest_score_first(criterion: str) -> None:
    assert [c.layer for c in ranking(FOUR, criterion)] == BEST_FIRST[criterion]


def test_ties_go_to_the_lower_layer_whatever_the_order() -> None:
    tied = [candidate(i, 1.0, 0.5) for i in (4, 1, 3, 0, 2)]
    assert [c.layer for c in ranking(tied, "cca")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if row.measures])
def test_what_is_measured_of_a_layer_alone_is_what_it_is_ranked_by(criterion: str) -> None:
    losses = [0.3, 0.1, 0.2]
    measures = CRITERIA[criterion].measures
    assert measures is not None
    found = [
        with_loss(candidate(i, 1.0, 0.5), measures, Loss(kl, 0.01, 0.0, 0.0)) for i, kl in enumerate(losses)
    ]
    assert [c.layer for c in ranking(found, criterion)] == [1, 2, 0]
    if criterion == "linearity":
        assert (found[0].predicted, found[0].sensitivity_se) == (0.15, 0.01)


@pytest.mark.parametrize(
    ("settings", "layers", "words"),
    [
        (SelectSettings(layers=(0, 5)), [2, 0, 1], r"names layer 5; the layers that can be are 0, 1, 2\.$"),
        (
            SelectSettings(layers=(4,)),
            [3, 7],
            r"layer 4, which cannot be linearized \(conv\); .* are 3, 7\.$",
        ),
        (SelectSettings(layers=(Mlp(1),)), [0, 1], r"no moments of MLPs: calibrate with --blocks both\.$"),
        (
            SelectSettings(layers=(Span(0, 1),)),
            [0, 1],
            r"no moments of spans: calibrate with --blocks all\.$",
        ),
        (SelectSettings(layers=(Span(0, 9),)), [0, Span(0, 1)], r"these have up to 4 of the layers 0\.$"),
        (
            SelectSettings(k=3),
            [0, 1],
            r"--k is 3; it must be between 0 and 2 \(the model's attention layers\)",
        ),
        (SelectSettings(k=5), [0, Mlp(0), Span(0, 1)], r"and 4 \(the model's attention layers and MLPs\)"),
        (SelectSettings(k=1, rank=4), [0], r"--rank is 4; .* of width 8: give less than 4"),
        (
            SelectSettings(k=1, fit="sequential"),
            [0, Span(0, 1)],
            r"--fit sequential is for attentions and MLPs",
        ),
    ],
)
def test_what_a_model_cannot_be_asked(settings: SelectSettings, layers: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_selection(settings, layers, 8, {"4": "conv"})


def test_what_layers_cost_together_is_predicted_as_the_sum() -> None:
    known = [replace(c, predicted=0.1 * c.layer) for c in FOUR]
    assert predicted_excess(known, (1, 3)) == pytest.approx(0.4)
    assert predicted_excess([replace(c, predicted=None) for c in FOUR], (1, 3)) is None
    assert predicted_excess(known, ()) is None


# scoring -----------------------------------------------------------------------------------------


def test_more_linear_layers_score_lower_by_either_criterion() -> None:
    noises = {0: 3.0, 1: 0.01, 2: 0.3, 3: 1.0}
    scores = scored({i: moments(noise, seed=i) for i, noise in noises.items()})
    assert [c.layer for c in scores] == [0, 1, 2, 3]
    for criterion in ("cca", "nmse"):
        assert [c.layer for c in ranking(scores, criterion)] == [1, 2, 3, 0]
    for c in scores:
        assert 0 <= c.nmse <= 1
        assert 0 <= c.cca <= 4
        known = {name: value for name, value in vars(c).items() if value is not None}
        assert known == {"layer": c.layer, "nmse": c.nmse, "cca": c.cca, "ridge": 1e-6, "cca_ridge": 1e-6}


def test_a_layer_that_cannot_be_fitted_is_named() -> None:
    good, few = moments(0.1), moments(0.1, n=3)
    broken = moments(0.1)
    broken.yy[1, 1] = np.nan
    with pytest.raises(CalibrationError, match=r"^Layer 7 cannot be linearized: 3 calibration tokens .*\.$"):
        scored({2: good, 7: few})
    with pytest.raises(CalibrationError, match=r"^Layer 2 cannot be linearized: .* NaN or infinite\.$"):
        scored({2: broken, 7: good})
    with pytest.raises(CalibrationError, match=r"^Layer 7 cannot be linearized"):
        score_layer(few, 7, "normed", 1e-6)


def singular(stream: str) -> LayerMoments:
    """Moments of a layer whose ``stream``, x or h, has one direction repeated in every channel."""
    m = moments(0.1)
    getattr(m, stream * 2)[:] = 200.0
    getattr(m, stream)[:] = 0.0
    cross = getattr(m, f"y{stream}")
    cross[:] = cross[:, :1]
    return m


def test_a_ridge_that_had_to_grow_is_noted() -> None:
    listener = Notes()
    scored({0: moments(0.1), 1: moments(0.1)}, listener=listener)
    assert listener.notes == []
    layers = {0: moments(0.1), 5: singular("x"), 7: singular("h")}
    good, fit, bound = scored(layers, 0.0, listener)
    assert good.ridge == good.cca_ridge == fit.cca_ridge == bound.ridge == 0.0
    assert fit.ridge > 0
    assert bound.cca_ridge > 0
    assert listener.notes == [
        f"Layer 5: the fit needed a ridge of {fit.ridge:g} instead of 0.",
        f"Layer 7: the CCA bound needed a ridge of {bound.cca_ridge:g} instead of 0.",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("criterion", "name"), [("linearity", "predicted"), ("cca", "cca")])
def test_a_score_that_is_no_number_is_not_ranked(value: float, criterion: str, name: str) -> None:
    candidates = [Candidate(i, 0.1, 1.0, 1e-6, 1e-6, kl=0.1 * i, predicted=0.2) for i in range(3)]
    candidates[1] = replace(candidates[1], **{name: value})
    with pytest.raises(
        CalibrationError, match=rf"^Layer 1 cannot be ranked: its score by {criterion} is {value:g}"
    ):
        ranking(candidates, criterion)


# what is found ------------------------------------------------------------------------------------


LOSS = Loss(0.5, 0.1, 0.2, 0.02)
POINTS = tuple(CurvePoint.of(range(k), replace(LOSS, kl=0.1 * (9 - k))) for k in (3, 1, 4, 2))
SCORES = Scores(
    (
        ScoredLayer(0, 0.5, 2.0, 1e-6, 1e-6),
        ScoredLayer(2, 0.25, 1.0, 1e-6, 1e-6, kl=math.inf, kind="sliding window"),
    ),
    {"1": "state space"},
    Curve(POINTS, 0, Budget(max_kl=0.0), 512, 4096, 12),
    PlanLoss(0.1, LOSS, None, {"2": 0.01}, LOSS),
    "bfloat16",
)


def test_a_perplexity_ratio_by_hand() -> None:
    """An excess of ln 1.25 nats a token is a quarter more perplexity."""
    loss = Loss(kl=0.5, kl_se=0.1, excess=math.log(1.25), excess_se=0.02)
    assert loss.perplexity_ratio == pytest.approx(1.25)
    assert loss.perplexity_ratio_se == pytest.approx(0.025)
    point = CurvePoint.of((7, 3), loss)
    assert (point.k, point.layers, point.perplexity_ratio_se) == (2, (3, 7), pytest.approx(0.025))
    beyond = Loss(1.0, 0.0, 800.0, 0.0)
    assert beyond.perplexity_ratio == math.inf and beyond.finite and math.isnan(exp(math.nan))
    assert not Loss(math.nan, 0.0, 0.0, 0.0).finite and not Loss(0.0, 0.0, math.inf, 0.0).finite
    assert Loss(0.1, math.nan, 0.1, math.nan).finite


def test_losses_for_what_is_saved() -> None:
    assert [per_saving(3.0, 2.0), per_saving(-3.0, 2.0), per_saving(0.0, 2.0)] == [1.5, -6.0, 0.0]
    assert per_saving(1.0, 0.0) == per_saving(-1.0, -1.0) == math.inf


@pytest.mark.parametrize(
    ("budget", "kl", "ratio", "kept"),
    [
        (Budget(max_kl=0.2), 0.2, 1.0, True),
        (Budget(max_kl=0.2), 0.2001, 1.0, False),
        (Budget(max_kl=0.2), math.nan, 1.0, False),
        (Budget(max_perplexity_ratio=1.1), 9.0, 1.0999, True),
        (Budget(max_perplexity_ratio=1.1), 0.0, 1.1001, False),
        (Budget(0.2, 1.1), 0.1, 1.2, False),
        (Budget(0.2, 1.1), 0.3, 1.0, False),
        (Budget(min_speedup=9.0), 99.0, 99.0, True),
    ],
)
def test_a_loss_is_kept_or_not(budget: Budget, kl: float, ratio: float, kept: bool) -> None:
    assert keeps(budget, Loss(kl, 0.0, math.log(ratio), 0.0)) is kept


def test_scores_come_back_from_json() -> None:
    """Not measured is not nought, nor is a KL without bound."""
    raw = json.loads(json.dumps(to_json(SCORES), allow_nan=False))
    assert from_json(Scores, raw, "it", "do it again") == SCORES
    assert [p.k for p in SCORES.curve.by_k] == [1, 2, 3, 4]  # type: ignore[union-attr]
