"""Scores, their ranking, and the choice of layers or the refusal of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.moments import LayerMoments, Moments
from nbl_export.errors import CalibrationError, InputError
from nbl_export.linearize.select import (
    CRITERIA,
    Candidate,
    check_k,
    choose_layers,
    fit_layer,
    ranking,
    score_layers,
)
from nbl_export.progress import Silent


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def candidate(layer: int, cca: float, nmse: float) -> Candidate:
    return Candidate(layer, nmse=nmse, cca=cca, ridge=1e-6, cca_ridge=1e-6)


# By cca: 3, 0, 2, 1. By nmse: 1, 2, 0, 3.
FOUR = (candidate(0, 2.0, 0.3), candidate(1, 9.0, 0.1), candidate(2, 5.0, 0.2), candidate(3, 1.0, 0.9))


def moments(noise: float, d: int = 4, n: int = 200, seed: int = 0) -> LayerMoments:
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, d))
    y = h @ rng.normal(size=(d, d)) + noise * rng.normal(size=(n, d))
    gram: dict[str, Any] = {"xx": h.T @ h, "yx": y.T @ h, "yy": y.T @ y, "hh": h.T @ h, "yh": y.T @ h}
    return LayerMoments(n=n, x=h.sum(0), h=h.sum(0), y=y.sum(0), **gram)


# choosing ----------------------------------------------------------------------------------------


def test_ranking_puts_the_lowest_score_first() -> None:
    assert [c.layer for c in ranking(FOUR, "cca")] == [3, 0, 2, 1]
    assert [c.layer for c in ranking(FOUR, "nmse")] == [1, 2, 0, 3]
    assert set(CRITERIA) == {"cca", "nmse"}


def test_ties_go_to_the_lower_layer_whatever_the_order() -> None:
    tied = [candidate(i, 1.0, 0.5) for i in (4, 1, 3, 0, 2)]
    assert [c.layer for c in ranking(tied, "cca")] == [0, 1, 2, 3, 4]
    assert choose_layers(tied, k=2) == (0, 1)


def test_an_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"--criterion 'magic' is unknown; choose one of cca, nmse\."):
        ranking(FOUR, "magic")


@pytest.mark.parametrize(
    ("k", "criterion", "chosen"),
    [
        (0, "cca", ()),
        (1, "cca", (3,)),
        (2, "cca", (0, 3)),
        (2, "nmse", (1, 2)),
        (4, "nmse", (0, 1, 2, 3)),
    ],
)
def test_the_k_best_are_chosen_in_ascending_order(k: int, criterion: str, chosen: tuple[int, ...]) -> None:
    assert choose_layers(FOUR, k=k, criterion=criterion) == chosen


def test_named_layers_are_taken_whatever_their_score() -> None:
    assert choose_layers(FOUR, layers=[2, 1]) == (1, 2)
    assert choose_layers(FOUR, k=2, layers=[2, 1]) == (1, 2)
    assert choose_layers(FOUR, layers=[]) == ()


@pytest.mark.parametrize("k", [-1, 5, 100])
def test_a_k_that_the_model_does_not_have(k: int) -> None:
    message = rf"--k is {k}; it must be between 0 and 4 \(the model's attention layers\)\."
    with pytest.raises(InputError, match=message):
        choose_layers(FOUR, k=k)
    with pytest.raises(InputError, match=message):
        check_k(k, 4)


def test_a_k_before_the_model_is_known() -> None:
    with pytest.raises(
        InputError, match=r"--k is -1; it must be between 0 and the model's attention layers\."
    ):
        check_k(-1, None)
    check_k(1000, None)
    check_k(0, 4)
    check_k(4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [1, 4]}, r"--layers names layer 4; the model has layers 0 to 3\."),
        ({"layers": [-1]}, r"--layers names layer -1; the model has layers 0 to 3\."),
        ({"layers": [1, 2, 1]}, r"--layers names a layer twice\."),
        ({"layers": [1, 2], "k": 1}, r"--k 1 and --layers with 2 layers contradict each other: give one\."),
        ({"layers": [1, 1], "k": 1}, r"contradict each other"),
        ({"layers": [], "k": 2}, r"--k 2 and --layers with 0 layers contradict"),
        ({}, r"Say how many layers to linearize: --k K \(or name them with --layers\)\."),
    ],
)
def test_choices_that_cannot_be_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_layers(FOUR, **arguments)


# scoring -----------------------------------------------------------------------------------------


def test_more_linear_layers_score_lower_by_either_criterion() -> None:
    noises = {0: 3.0, 1: 0.01, 2: 0.3, 3: 1.0}
    scores = score_layers(Moments({i: moments(noise, seed=i) for i, noise in noises.items()}))
    assert [c.layer for c in scores] == [0, 1, 2, 3]
    for criterion in CRITERIA:
        assert [c.layer for c in ranking(scores, criterion)] == [1, 2, 3, 0]
    for c in scores:
        assert 0 <= c.nmse <= 1
        assert 0 <= c.cca <= 4
        assert c.as_json() == {
            "layer": c.layer, "nmse": c.nmse, "cca": c.cca, "ridge": 1e-6, "cca_ridge": 1e-6
        }  # fmt: skip


def test_a_layer_that_cannot_be_fitted_is_named() -> None:
    good, few = moments(0.1), moments(0.1, n=3)
    broken = moments(0.1)
    broken.yy[1, 1] = np.nan
    with pytest.raises(CalibrationError, match=r"^Layer 7 cannot be linearized: 3 calibration tokens .*\.$"):
        score_layers(Moments({2: good, 7: few}))
    with pytest.raises(CalibrationError, match=r"^Layer 2 cannot be linearized: .* NaN or infinite\.$"):
        score_layers(Moments({2: broken, 7: good}))
    with pytest.raises(CalibrationError, match=r"^Layer 7 cannot be linearized"):
        fit_layer(Moments({7: few}), 7, "normed", 1e-6)


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
