"""The fit and the bound against least squares and canonical correlations of the raw activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.batch import F64
from nbl_export.calibrate.moments import LayerMoments, Moments
from nbl_export.errors import InputError
from nbl_export.linearize.fits import without_bias
from nbl_export.linearize.lmmse import (
    Covariances,
    UnusableMoments,
    branch_covariances,
    cca_bound,
    constant_direction,
    error_of_map,
    fit_lmmse,
    rank_within,
    ridge_by_heldout_error,
    stream_covariances,
    truncate,
)
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.settings.choices import DEFAULT_RIDGE, MAX_RIDGE, FitInput
from tests.linearize.made import least_squares

FIT_INPUTS: tuple[FitInput, ...] = ("normed", "residual")


def activations(n: int = 400, d: int = 7, seed: int = 0, noise: float = 0.5) -> tuple[F64, F64, F64]:
    """h with means and correlations, x a normalized h, y partly linear in both."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    x = h / np.sqrt((h**2).mean(1, keepdims=True) + 1) * rng.uniform(0.5, 2, size=d)
    y = x @ rng.normal(size=(d, d)) + 0.1 * h @ rng.normal(size=(d, d)) + noise * rng.normal(size=(n, d)) - 1
    return h, x, y


def moments(h: F64, x: F64, y: F64) -> LayerMoments:
    return LayerMoments(
        n=len(h), x=x.sum(0), h=h.sum(0), y=y.sum(0),
        xx=x.T @ x, yx=y.T @ x, yy=y.T @ y, hh=h.T @ h, yh=y.T @ h,
    )  # fmt: skip


def residual(u: F64, y: F64, w: F64, b: F64) -> float:
    """E‖y - ŷ‖² / E‖y - μ_y‖², row by row."""
    return float(((y - u @ w.T - b) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def rho2(u: F64, v: F64) -> float:
    """Σρ² as squared singular values between orthonormal bases of the centred data."""
    bases = [np.linalg.svd(a - a.mean(0), full_matrices=False)[0] for a in (u, v)]
    return float((np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2).sum())


# the fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize(("n", "d"), [(400, 7), (40, 20), (2, 1), (9, 8)])
def test_the_fit_is_least_squares_with_an_intercept(fit_input: FitInput, n: int, d: int) -> None:
    h, x, y = activations(n, d, seed=n)
    fit = fit_lmmse(moments(h, x, y), fit_input, ridge=0.0)
    w, b = least_squares(h if fit_input == "residual" else x, y)
    # The normal equations square the condition number; the smallest cases are ill-conditioned.
    np.testing.assert_allclose(fit.w, w, rtol=1e-6, atol=1e-6 * np.abs(w).max())
    np.testing.assert_allclose(fit.b, b, rtol=1e-6, atol=1e-6 * np.abs(w).max())
    assert fit.w.shape == (d, d)
    assert fit.b.shape == (d,)
    assert fit.ridge == 0.0


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize("ridge", [0.0, DEFAULT_RIDGE, 1e-2])
@pytest.mark.parametrize("noise", [0.0, 0.5, 20.0])
def test_nmse_is_the_residual_on_the_tokens(fit_input: FitInput, ridge: float, noise: float) -> None:
    h, x, y = activations(noise=noise)
    fit = fit_lmmse(moments(h, x, y), fit_input, ridge)
    direct = residual(h if fit_input == "residual" else x, y, fit.w, fit.b)
    assert fit.nmse == pytest.approx(direct, rel=1e-9, abs=1e-12)


def test_the_ridge_does_not_depend_on_the_units_of_a_channel() -> None:
    (h, x, y), ridge = activations(), 1e-2
    units = 10.0 ** np.linspace(-4, 4, 7)
    one = fit_lmmse(moments(h, x, y), "normed", ridge)
    other = fit_lmmse(moments(h, x * units, y), "normed", ridge)
    np.testing.assert_allclose(other.w * units, one.w, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(other.b, one.b, rtol=1e-6, atol=1e-9)
    assert other.nmse == pytest.approx(one.nmse, rel=1e-9)


def test_the_ridge_is_ridge_regression_in_units_of_the_standard_deviation() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    h, x, y = activations()
    fit = fit_lmmse(moments(h, x, y), "normed", 1e-2)
    deviation = x.std(0)
    reference = linear_model.Ridge(alpha=1e-2 * len(x)).fit((x - x.mean(0)) / deviation, y)
    np.testing.assert_allclose(fit.w, reference.coef_ / deviation, rtol=1e-8, atol=1e-10)


# covariances and the bound -----------------------------------------------------------------------


def test_covariances_are_those_of_the_data() -> None:
    h, x, y = activations()
    m = moments(h, x, y)
    for c, u, v in (
        (branch_covariances(m, "normed"), x, y),
        (branch_covariances(m, "residual"), h, y),
        (stream_covariances(m), h, y + h),
    ):
        d = u.shape[1]
        joint = np.cov(np.column_stack([u, v]), rowvar=False, bias=True)
        np.testing.assert_allclose(c.mean_u, u.mean(0), atol=1e-12)
        np.testing.assert_allclose(c.mean_v, v.mean(0), atol=1e-12)
        np.testing.assert_allclose(c.c_uu, joint[:d, :d], atol=1e-11)
        np.testing.assert_allclose(c.c_vu, joint[d:, :d], atol=1e-11)
        np.testing.assert_allclose(c.c_vv, joint[d:, d:], atol=1e-11)


@pytest.mark.parametrize(("n", "d"), [(400, 7), (60, 20)])
@pytest.mark.parametrize("noise", [0.0, 0.5, 20.0])
def test_the_bound_is_d_minus_the_squared_canonical_correlations(n: int, d: int, noise: float) -> None:
    h, x, y = activations(n, d, noise=noise)
    bound, ridge = cca_bound(moments(h, x, y), ridge=0.0)
    assert bound == pytest.approx(d - rho2(h, y + h), abs=1e-7)
    assert ridge == 0.0


# what cannot be fitted ---------------------------------------------------------------------------


def fitted_every_way(m: LayerMoments) -> list[Any]:
    return [lambda: fit_lmmse(m, "normed"), lambda: fit_lmmse(m, "residual"), lambda: cca_bound(m)]


def test_too_few_tokens_say_how_many_are_needed() -> None:
    h, x, y = activations(n=7)
    for fit in fitted_every_way(moments(h, x, y)):
        with pytest.raises(UnusableMoments) as caught:
            fit()
        message = str(caught.value)
        assert message.startswith("7 calibration tokens cannot determine a linear layer of 7 inputs")
        assert "at least 8 are needed, 140 or more are advised" in message
        assert "--samples" in message
    h, x, y = activations(n=8)
    assert np.isfinite(fit_lmmse(moments(h, x, y), "normed").w).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["y", "yy"])
def test_a_bad_moment_is_refused(where: str, bad: float) -> None:
    m = moments(*activations())
    getattr(m, where).flat[3] = bad
    for fit in fitted_every_way(m):
        with pytest.raises(UnusableMoments, match="its moments are NaN or infinite"):
            fit()


def test_a_matrix_that_no_ridge_mends_is_refused() -> None:
    m = moments(*activations())
    m.xx[0, 1] = m.xx[1, 0] = 10 * m.xx.max()  # no covariance of any data
    with pytest.raises(UnusableMoments, match=r"not positive definite, even with a ridge of 0\.01"):
        fit_lmmse(m, "normed")


# singular covariances ----------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [None, 0.0, 3.0, 1e5])
@pytest.mark.parametrize("ridge", [0.0, DEFAULT_RIDGE])
def test_a_dead_or_doubled_channel_is_fitted_as_well_as_without_it(
    constant: float | None, ridge: float
) -> None:
    h, x, y = activations()
    for array in (h, x):
        array[:, 5] = array[:, 2] if constant is None else constant
    m = moments(h, x, y)
    for fit_input, u in (("normed", x), ("residual", h)):
        fit = fit_lmmse(m, fit_input, ridge)
        best = residual(u, y, *least_squares(u, y))
        assert fit.nmse == pytest.approx(best, rel=1e-4)
        # As a plan keeps them: a large weight on a large constant would lose the rest in float32.
        w, b = fit.w.astype(np.float32), fit.b.astype(np.float32)
        assert residual(u.astype(np.float32), y, w, b) == pytest.approx(best, rel=1e-3)
        assert ridge <= fit.ridge <= MAX_RIDGE
    bound, used = cca_bound(m, ridge)
    # Six correlations of h remain at most, and seven of y + h.
    assert 0 <= bound <= 7 and ridge <= used <= MAX_RIDGE


def test_a_singular_matrix_grows_the_ridge_and_says_so() -> None:
    h, x, y = activations()
    # Rank one with an exact zero pivot: 0 fails, the first ridge that works is reported.
    x[:] = np.where(np.arange(400) % 2, 1.0, -1.0)[:, None]
    fit = fit_lmmse(moments(h, x, y), "normed", ridge=0.0)
    assert 0 < fit.ridge <= MAX_RIDGE
    assert np.isfinite(fit.w).all()
    assert fit.nmse == pytest.approx(residual(x, y, *least_squares(x, y)), rel=1e-4)


def test_a_constant_output_is_predicted_exactly() -> None:
    h, x, y = activations()
    y[:] = 0.0
    fit = fit_lmmse(moments(h, x, y), "normed")
    assert fit.nmse == 0.0
    np.testing.assert_array_equal(fit.w, 0)
    np.testing.assert_array_equal(fit.b, 0)


# any data ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 8),
    extra=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    noise=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    ridge=st.sampled_from([0.0, DEFAULT_RIDGE, 1e-3]),
    fit_input=st.sampled_from(FIT_INPUTS),
)
def test_a_fit_is_never_worse_than_the_mean(
    d: int, extra: int, seed: int, noise: float, ridge: float, fit_input: FitInput
) -> None:
    h, x, y = activations(d + extra, d, seed, noise)
    m = moments(h, x, y)
    fit = fit_lmmse(m, fit_input, ridge)
    assert 0 <= fit.nmse <= 1
    u = h if fit_input == "residual" else x
    assert residual(u, y, fit.w, fit.b) <= 1 + 1e-9
    bound, _ = cca_bound(m, ridge)
    assert -1e-6 * d <= bound <= d


# other text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_error_of_a_map_on_other_text_is_that_of_its_rows(fit_input: FitInput) -> None:
    fit = fit_lmmse(moments(*activations(60, seed=1)), fit_input)
    h, x, y = activations(30, seed=2)
    judged = branch_covariances(moments(h, x, y), fit_input)
    u = h if fit_input == "residual" else x
    # Nothing bounds it: the map was made for text with other means and another relation.
    assert error_of_map(fit.w, fit.b, judged) == pytest.approx(residual(u, y, fit.w, fit.b), rel=1e-9)
    w, b = np.random.default_rng(3).normal(size=(7, 7)), np.arange(7.0)
    assert error_of_map(w, b, judged) == pytest.approx(residual(u, y, w, b), rel=1e-9)
    assert error_of_map(np.zeros((7, 7)), y.mean(0), judged) == pytest.approx(1.0)


def related(n: int, seed: int, d: int = 12) -> tuple[F64, F64, F64]:
    """Text of one kind: the relation is the same in every part of it, the noise is not."""
    relation = np.random.default_rng(0).normal(size=(d, d)) * 0.3
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, d)) * np.geomspace(0.01, 10, d)
    return h, h * 0.5, h @ relation + 2 * rng.normal(size=(n, d))


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize(("n", "ridges"), [(14, (1e-6, 1e-3, 1e-1, 1.0)), (4000, (1e-6, 1e-2, 1.0))])
def test_the_ridge_is_the_one_that_errs_least_on_other_text(
    fit_input: FitInput, n: int, ridges: tuple[float, ...]
) -> None:
    """By brute force: least squares with a row more for each channel, judged row by row."""
    (h, x, y), (other_h, other_x, other_y) = related(n, 1), related(300, 2)
    u, other_u = (h, other_h) if fit_input == "residual" else (x, other_x)
    errors = {}
    for ridge in ridges:
        centred, wanted = u - u.mean(0), y - y.mean(0)
        more = np.diag(np.sqrt(ridge * (centred**2).sum(0)))
        w = np.linalg.lstsq(np.vstack([centred, more]), np.vstack([wanted, np.zeros_like(more)]), rcond=None)[
            0
        ].T
        errors[ridge] = residual(other_u, other_y, w, y.mean(0) - w @ u.mean(0))
    best = min(errors, key=lambda r: errors[r])
    assert (
        ridge_by_heldout_error(moments(h, x, y), moments(other_h, other_x, other_y), fit_input, ridges)
        == best
    )
    # Little text wants a ridge, plenty of it hardly one.
    assert best >= 1e-1 if n == 14 else best < 1.0


# rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_truncated_map_errs_least_of_its_rank(rank: int) -> None:
    h, x, y = activations()
    fit, c = fit_lmmse(moments(h, x, y), "normed"), branch_covariances(moments(h, x, y), "normed")
    low = truncate(fit.w, fit.b, c, rank)
    assert low.up.shape == (7, rank) and low.down.shape == (rank, 7)
    # What is lost is what the rows lose, and adds to the error of the fit.
    written, kept = x @ fit.w.T + fit.b, x @ (low.up @ low.down).T + low.b
    energy = ((y - y.mean(0)) ** 2).sum()
    assert low.lost == pytest.approx(((written - kept) ** 2).sum() / energy, rel=1e-6)
    assert error_of_map(low.up @ low.down, low.b, c) == pytest.approx(fit.nmse + low.lost, rel=1e-4)
    np.testing.assert_allclose(kept.mean(0), y.mean(0), atol=1e-10)
    # By the singular values of the outputs themselves: nothing of that rank loses less.
    values = np.linalg.svd(written - written.mean(0), compute_uv=False)
    assert low.lost == pytest.approx((values[rank:] ** 2).sum() / energy, rel=1e-6)
    # The plain singular value decomposition of W does not know which inputs vary.
    u, s, v = np.linalg.svd(fit.w)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    centred = (x - x.mean(0)) @ (fit.w - plain).T
    assert low.lost < (centred**2).sum() / energy


def test_a_map_of_full_rank_and_one_of_nothing_lose_nothing() -> None:
    h, x, y = activations()
    fit, c = fit_lmmse(moments(h, x, y), "residual"), branch_covariances(moments(h, x, y), "residual")
    whole = truncate(fit.w, fit.b, c, 7)
    np.testing.assert_allclose(whole.up @ whole.down, fit.w, atol=1e-10)
    assert whole.lost == 0
    nothing = truncate(np.zeros((7, 7)), fit.b, c, 2)
    assert not (nothing.up @ nothing.down).any() and nothing.lost == 0
    np.testing.assert_array_equal(nothing.b, fit.b)


@pytest.mark.parametrize("tolerance", [1e-4, 0.02, 0.3])
def test_the_smallest_rank_within_a_share_of_the_fit_s_error(tolerance: float) -> None:
    """Outputs of 40 directions that fall off, of inputs that explain them but for noise."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4000, 40))
    y = x @ (rng.standard_normal((40, 40)) * 0.6 ** np.arange(40)) + 0.3 * rng.standard_normal((4000, 40))
    m = moments(x, x, y)
    fit, c = fit_lmmse(m, "normed"), branch_covariances(m, "normed")
    rank = rank_within(fit.w, fit.b, c, tolerance)
    lost = {r: truncate(fit.w, fit.b, c, r).lost for r in range(2, 20, 2)}
    enough = [r for r, share in lost.items() if share <= tolerance * fit.nmse]
    assert rank == min(enough, default=None) and (rank is None) == (tolerance == 1e-4)


def test_ranks_come_in_steps_that_suit_kernels() -> None:
    """A rank-1 map needs the first step only: a sixteenth of the width, of 32 where that is more."""
    for d, step in ((7, 1), (64, 4), (576, 32), (2048, 128)):
        o = np.zeros(d)
        c = Covariances(o, o, np.eye(d), 0.5 * np.eye(d), np.eye(d), np.ones(d), np.ones(d))
        w = np.zeros((d, d))
        w[0, 0] = 0.5
        assert rank_within(w, np.zeros(d), c, 0.02) == step


def test_what_overflows_is_no_perfect_fit() -> None:
    """Finite covariances whose sums are not: a variance that is NaN was an error of zero."""
    m = moments(*activations())
    fit, c = fit_lmmse(m, "normed"), branch_covariances(m, "normed")
    for bad in (1.7e308, np.nan):
        with pytest.raises(UnusableMoments, match="the variance of its output is NaN or infinite"):
            error_of_map(fit.w, fit.b, replace(c, c_vv=np.full_like(c.c_vv, bad)))


def test_maps_beyond_float32_are_refused() -> None:
    h, x, y = activations()
    with pytest.raises(UnusableMoments, match="its W or b is NaN, infinite or beyond float32"):
        fit_lmmse(moments(h, x, y * 1e45), "normed")


# without b ----------------------------------------------------------------------------------------


D = 7


def plan_of(layers: dict[int, LinearLayer]) -> Plan:
    return Plan("of a test", D, 4, "normed", "by hand", 1e-6, 400, layers, {}, {}, {})


def test_without_b_it_is_the_fit_without_intercept() -> None:
    _, u, y = activations()
    layer = moments(u, u, y)
    fit = fit_lmmse(layer, "normed")
    plan = plan_of({2: LinearLayer(fit.w.astype(np.float32), fit.b.astype(np.float32))})
    (found,) = without_bias(plan, Moments({2: layer})).layers.values()
    expected = np.linalg.lstsq(u, y, rcond=None)[0].T
    assert not found.b.any() and np.abs(found.w - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_constant_channel_takes_b_in_whole() -> None:
    _, u, y = activations()
    u[:, 0] = 2.0
    layer = moments(u, u, y)
    w, b = np.ones((D, D), np.float32), np.arange(D, dtype=np.float32)
    (found,) = without_bias(plan_of({1: LinearLayer(w, b)}), Moments({1: layer})).layers.values()
    assert np.abs(u @ found.w.T - (u @ w.T + b)).max() < 1e-2
    v = constant_direction(branch_covariances(layer, "normed"))
    assert np.abs(u @ v - 1).max() < 1e-2


def test_a_layer_without_moments_is_named() -> None:
    layer = moments(*activations())
    plan = plan_of({1: LinearLayer(np.eye(D, dtype=np.float32), np.ones(D, np.float32))})
    with pytest.raises(InputError, match="There are no moments of layer 1: run `nbl-export calibrate` again"):
        without_bias(plan, Moments({2: layer}))
    assert without_bias(replace(plan, rank=2), Moments({1: layer})).rank is None
