"""Scores, their ranking, and the choice of layers or the refusal of one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbl_export.blocks import Mlp, Span
from nbl_export.calibrate.moments import LayerMoments, Moments
from nbl_export.errors import CalibrationError, InputError
from nbl_export.linearize.scores import (
    CRITERIA,
    check_selection,
    predicted_excess,
    ranking,
    score_layer,
    score_layers,
)
from nbl_export.linearize.selection import Candidate, Loss
from nbl_export.progress import Silent
from nbl_export.settings import SelectSettings
from tests.listening import Notes


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
    every = Moments(layers)
    listener = listener or Silent()
    return score_layers(
        layers, ridge, listener, lambda some: [score_layer(every, i, "normed", ridge) for i in some], 2
    )


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
    found = [measures(candidate(i, 1.0, 0.5), Loss(kl, 0.01, 0.0, 0.0)) for i, kl in enumerate(losses)]
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


def test_what_a_model_can_be_asked() -> None:
    for settings in (SelectSettings(layers=(7, 3), rank=3), SelectSettings(k=2), SelectSettings(k=0)):
        check_selection(settings, [3, 7], 8)
    check_selection(SelectSettings(k=4, rank=99), [0, Mlp(0), Span(0, 1), Span(1, 1)], None)


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
        score_layer(Moments({7: few}), 7, "normed", 1e-6)


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
