"""Linear layers without b: the fit without intercept, and what it leaves of W u + b."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nbl_export.calibrate.moments import LayerMoments, Moments
from nbl_export.errors import InputError
from nbl_export.linearize.fits import without_bias
from nbl_export.linearize.lmmse import branch_covariances, constant_direction, fit_lmmse
from nbl_export.linearize.plan import LinearLayer, Plan

D, N = 6, 4000


def material(seed: int, mean: float = 1.0) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """u and y [N, D], y with a mean that no W u has."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) + mean * rng.normal(size=D)
    y = u @ rng.normal(size=(D, D)) + np.sin(u) + 3 * rng.normal(size=D)
    return u, y


def moments_of(u: np.ndarray, y: np.ndarray) -> LayerMoments:  # type: ignore[type-arg]
    zero, zeros = np.zeros(D), np.zeros((D, D))
    return LayerMoments(
        n=N, h=zero, x=u.sum(0), y=y.sum(0), hh=zeros, xx=u.T @ u, yy=y.T @ y, yh=zeros, yx=y.T @ u
    )


def plan_of(layers: dict[int, LinearLayer]) -> Plan:
    return Plan("of a test", D, 4, "normed", "by hand", 1e-6, N, layers, {}, {}, {})


def test_it_is_the_fit_without_intercept() -> None:
    u, y = material(0)
    layer = moments_of(u, y)
    fit = fit_lmmse(layer, "normed")
    plan = plan_of({2: LinearLayer(fit.w.astype(np.float32), fit.b.astype(np.float32))})
    (found,) = without_bias(plan, Moments({2: layer})).layers.values()
    expected = np.linalg.lstsq(u, y, rcond=None)[0].T
    assert not found.b.any() and np.abs(found.w - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_constant_channel_takes_b_in_whole() -> None:
    u, y = material(1)
    u[:, 0] = 2.0
    layer = moments_of(u, y)
    w, b = np.ones((D, D), np.float32), np.arange(D, dtype=np.float32)
    (found,) = without_bias(plan_of({1: LinearLayer(w, b)}), Moments({1: layer})).layers.values()
    assert np.abs(u @ found.w.T - (u @ w.T + b)).max() < 1e-2
    v = constant_direction(branch_covariances(layer, "normed"))
    assert np.abs(u @ v - 1).max() < 1e-2


def test_no_other_matrix_is_closer() -> None:
    u, y = material(2, mean=0.3)
    layer = moments_of(u, y)
    w, b = np.eye(D, dtype=np.float32), np.ones(D, np.float32)
    plan = plan_of({1: LinearLayer(w, b)})
    (found,) = without_bias(plan, Moments({1: layer})).layers.values()

    def off(matrix: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.square(u @ matrix.T - (u @ w.T + b)).mean())

    rng = np.random.default_rng(3)
    assert all(off(found.w) < off(found.w + 1e-2 * rng.normal(size=(D, D))) for _ in range(20))
    assert off(found.w) < off(w), "b is worth taking in"


def test_a_layer_without_moments_is_named() -> None:
    u, y = material(4)
    plan = plan_of({1: LinearLayer(np.eye(D, dtype=np.float32), np.ones(D, np.float32))})
    with pytest.raises(InputError, match="There are no moments of layer 1: run `nbl-export calibrate` again"):
        without_bias(plan, Moments({2: moments_of(u, y)}))
    ranked = replace(plan, rank=2)
    assert without_bias(ranked, Moments({1: moments_of(u, y)})).rank is None
