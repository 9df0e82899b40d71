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
    Candidate,
    check_criterion,
    check_k,
    check_layers,
    check_selection,
    predicted_excess,
    ranking,
    score_layer,
    score_layers,
)
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


# choosing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranking_puts_the_lowest_score_first(criterion: str) -> None:
    assert [c.layer for c in ranking(FOUR, criterion)] == BEST_FIRST[criterion]


def test_what_each_criterion_takes() -> None:
    assert set(CRITERIA) == set(BEST_FIRST)
    assert {name for name, row in CRITERIA.items() if not row.measured} == {"cca", "nmse"}
    assert {name for name, row in CRITERIA.items() if row.searched} == {"greedy"}


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if row.measured])
def test_a_layer_that_was_not_measured_has_no_place(criterion: str) -> None:
    with pytest.raises(ValueError, match=f"layer 7 was not measured for {criterion}"):
        ranking([*FOUR, candidate(7, 0.0, 0.0)], criterion)


def test_ties_go_to_the_lower_layer_whatever_the_order() -> None:
    tied = [candidate(i, 1.0, 0.5) for i in (4, 1, 3, 0, 2)]
    assert [c.layer for c in ranking(tied, "cca")] == [0, 1, 2, 3, 4]


def test_an_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=rf"--criterion 'magic' is unknown; choose one of {', '.join(CRITERIA)}\."
    ):
        ranking(FOUR, "magic")
    with pytest.raises(InputError, match="'magic'"):
        check_criterion("magic")
    assert check_criterion("kl") is CRITERIA["kl"]


def test_layers_that_are_there_can_be_named() -> None:
    for candidates, layers in ((range(4), [2, 1]), (range(4), []), ([1, 3], [3])):
        check_layers(candidates, layers)


def test_a_layer_that_is_not_there_names_those_that_are() -> None:
    for candidates, have in (([2, 0, 1], r"layers 0 to 2\."), ([3, 7], r"attention layers 3, 7\.")):
        with pytest.raises(InputError, match=rf"--layers names layer 5; the model has {have}"):
            check_layers(candidates, [0, 5] if 0 in candidates else [5, 7])


def test_a_layer_is_read_once_to_be_scored() -> None:
    asked: list[int] = []

    class Counted(dict[int, LayerMoments]):
        def __getitem__(self, index: int) -> LayerMoments:
            asked.append(index)
            return super().__getitem__(index)

    layers = {i: moments(0.1, seed=i) for i in range(3)}
    assert score_layers(Moments(Counted(layers))) == score_layers(Moments(layers))
    assert asked == [0, 1, 2]


def test_what_a_model_cannot_be_asked() -> None:
    check_selection(SelectSettings(layers=(7, 3), rank=3), [3, 7], 8)
    check_selection(SelectSettings(k=2), [3, 7], 8)
    for settings in (SelectSettings(layers=(1,)), SelectSettings(k=3), SelectSettings(k=1, rank=4)):
        with pytest.raises(InputError):
            check_selection(settings, [3, 7], 8)


@pytest.mark.parametrize("k", [-1, 5, 100])
def test_a_k_that_the_model_does_not_have(k: int) -> None:
    message = rf"--k is {k}; it must be between 0 and 4 \(the model's attention layers\)\."
    with pytest.raises(InputError, match=message):
        check_k(k, range(4))
    check_k(0, range(4))
    check_k(4, range(4))


def test_k_counts_attentions_and_mlps() -> None:
    """A span of two layers has four of them; what two blocks share is there once."""
    for blocks, most, what in (
        ([Mlp(1), Mlp(2)], 2, "MLPs"),
        ([0, Mlp(0), 1], 3, "attention layers and MLPs"),
        ([0, Mlp(0), Span(0, 1), Span(1, 1)], 4, "attention layers and MLPs"),
    ):
        check_k(most, blocks)
        with pytest.raises(InputError, match=rf"between 0 and {most} \(the model's {what}\)\.$"):
            check_k(most + 1, blocks)


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_beyond_the_last(layer: int) -> None:
    with pytest.raises(InputError, match=rf"--layers names layer {layer}; the model has layers 0 to 3\."):
        check_layers(range(4), [1, layer])


def test_what_layers_cost_together_is_predicted_as_the_sum() -> None:
    known = [replace(c, predicted=0.1 * c.layer) for c in FOUR]
    assert predicted_excess(known, (1, 3)) == pytest.approx(0.4)
    assert predicted_excess([replace(c, predicted=None) for c in FOUR], (1, 3)) is None
    assert predicted_excess(known, ()) is None


# scoring -----------------------------------------------------------------------------------------


def test_more_linear_layers_score_lower_by_either_criterion() -> None:
    noises = {0: 3.0, 1: 0.01, 2: 0.3, 3: 1.0}
    scores = score_layers(Moments({i: moments(noise, seed=i) for i, noise in noises.items()}))
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
        score_layers(Moments({2: good, 7: few}))
    with pytest.raises(CalibrationError, match=r"^Layer 2 cannot be linearized: .* NaN or infinite\.$"):
        score_layers(Moments({2: broken, 7: good}))
    with pytest.raises(CalibrationError, match=r"^Layer 7 cannot be linearized"):
        score_layer(Moments({7: few}), 7, "normed", 1e-6)


def test_a_layer_whose_stream_alone_is_broken_is_named() -> None:
    broken = moments(0.1)
    broken.hh[0, 0] = np.inf
    with pytest.raises(CalibrationError, match=r"^Layer 3 cannot be linearized: .*NaN or infinite"):
        score_layers(Moments({3: broken}))


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
    score_layers(Moments({0: moments(0.1), 1: moments(0.1)}), listener=listener)
    assert listener.notes == []
    layers = {0: moments(0.1), 5: singular("x"), 7: singular("h")}
    good, fit, bound = score_layers(Moments(layers), ridge=0.0, listener=listener)
    assert good.ridge == good.cca_ridge == fit.cca_ridge == bound.ridge == 0.0
    assert fit.ridge > 0
    assert bound.cca_ridge > 0
    assert listener.notes == [
        f"Layer 5: the fit needed a ridge of {fit.ridge:g} instead of 0.",
        f"Layer 7: the CCA bound needed a ridge of {bound.cca_ridge:g} instead of 0.",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("criterion", "name"), [("kl", "kl"), ("linearity", "predicted"), ("cca", "cca")])
def test_a_score_that_is_no_number_is_not_ranked(value: float, criterion: str, name: str) -> None:
    candidates = [Candidate(i, 0.1, 1.0, 1e-6, 1e-6, kl=0.1 * i, predicted=0.2) for i in range(3)]
    candidates[1] = replace(candidates[1], **{name: value})
    with pytest.raises(
        CalibrationError, match=rf"^Layer 1 cannot be ranked: its score by {criterion} is {value:g}"
    ):
        ranking(candidates, criterion)
