"""The linear minimum mean squared error fit of a layer and its error bound. Pure mathematics.

With x the layer's input, y its output, μ their means and C their covariances (arXiv 2505.21077):

    W = C_yx C_xx⁻¹        b = μ_y - W μ_x                                     (Proposition 3.1)
    Σρ² = tr(C_yy⁻¹ C_yx C_xx⁻¹ C_xy)   bound = Σ (1 - ρ²) = d - Σρ²           (Theorem 3.2, trace form)

where ρ are the canonical correlations. The paper's ranking uses those between the residual stream h and y + h;
their covariances follow from those of h and y, so no second pass is needed:

    C_(y+h)h = C_yh + C_hh        C_(y+h)(y+h) = C_yy + C_yh + C_yhᵀ + C_hh

Ridge. C_xx is replaced by C_xx + λ diag(C_xx). Scaling by the diagonal makes the fit independent of the scale of
each channel, which differs by orders of magnitude in a residual stream. λ starts at ``ridge`` and is multiplied by 10
when Cholesky fails, up to 1e-2; the λ used is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.linalg

from nbl_export.batch import F64
from nbl_export.calibrate.moments import LayerMoments
from nbl_export.settings.choices import DEFAULT_RIDGE, MAX_RIDGE, FitInput

# The candidates when the ridge is chosen by held-out error.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
T = TypeVar("T")


class UnusableMoments(ValueError):
    """The moments of a layer cannot be fitted; the message says why."""


@dataclass(frozen=True)
class Covariances:
    """Means [d] and centred covariances [d, d] of an input u and an output v; ``power_*`` [d] are E[u²], E[v²]."""

    mean_u: F64
    mean_v: F64
    c_uu: F64
    c_vu: F64
    c_vv: F64
    power_u: F64
    power_v: F64


@dataclass(frozen=True)
class LinearFit:
    """ŷ = W x + b: ``w`` [d, d] (output × input), ``b`` [d], float64, and the λ used.

    ``nmse`` is E‖y - ŷ‖² / E‖y - μ_y‖² on the calibration tokens, between 0 and 1.
    """

    w: F64
    b: F64
    nmse: float
    ridge: float


def fit_lmmse(moments: LayerMoments, fit_input: FitInput, ridge: float = DEFAULT_RIDGE) -> LinearFit:
    """The LMMSE fit of a layer's output on its input.

    ``fit_input`` ``"normed"`` fits on the input of the attention, ``"residual"`` on the residual stream before the
    input norm. Raises :class:`UnusableMoments` if there are too few tokens, if a moment or what is made of it is NaN or
    infinite, or if no ridge up to ``MAX_RIDGE`` makes C_xx positive definite.
    """
    c = branch_covariances(moments, fit_input)

    def solve(ridge: float) -> tuple[F64, float]:
        factor = scipy.linalg.cho_factor(_regularized(c.c_uu, c.power_u, ridge), lower=True)
        return scipy.linalg.cho_solve(factor, c.c_vu.T).T, ridge

    w, used = _with_growing_ridge(solve, ridge)
    b = c.mean_v - w @ c.mean_u
    # Plans are float32. What is NaN is not within it, either.
    if not max(np.abs(w).max(), np.abs(b).max()) <= np.finfo(np.float32).max:
        raise UnusableMoments("its W or b is NaN, infinite or beyond float32")
    return LinearFit(w, b, error_of_map(w, b, c), used)


def constant_direction(c: Covariances) -> F64:
    """v [d], of which vᵀu is closest to 1: E[uuᵀ]⁻¹ E[u], with the ridge of a fit."""
    second = c.c_uu + np.outer(c.mean_u, c.mean_u)

    def solve(ridge: float) -> tuple[F64, float]:
        factor = scipy.linalg.cho_factor(second + ridge * np.diag(c.power_u), lower=True)
        return scipy.linalg.cho_solve(factor, c.mean_u), ridge

    return _with_growing_ridge(solve, DEFAULT_RIDGE)[0]


@dataclass(frozen=True)
class Truncated:
    """A linear layer of rank r: ``up`` [d, r] · ``down`` [r, d], and b [d], float64.

    ``lost`` is E‖ŷ - ŷ_r‖² / E‖y - μ_y‖²: the error that the truncation adds to that of the LMMSE fit.
    """

    up: F64
    down: F64
    b: F64
    lost: float


def truncate(w: F64, b: F64, c: Covariances, rank: int) -> Truncated:
    """The linear layer of ``rank`` whose output is closest to W u + b on the tokens of the covariances ``c``.

    With U the first ``rank`` eigenvectors of W C_uu Wᵀ, the covariance of the output, its weight is U Uᵀ W. That is
    the truncated singular value decomposition of W C_uu^½, which weights each input direction by its variance. The
    mean output is unchanged.
    """
    c_output = w @ c.c_uu @ w.T
    values, vectors = np.linalg.eigh(0.5 * (c_output + c_output.T))
    up = vectors[:, ::-1][:, :rank]
    down = up.T @ w
    energy = float(np.trace(c.c_vv))
    rest = float(np.clip(values[: len(values) - rank], 0, None).sum())
    return Truncated(up, down, b + (w - up @ down) @ c.mean_u, rest / energy if energy > 0 else 0.0)


# What truncating W may add to the error of its fit where the rank is chosen: two hundredths.
RANK_TOLERANCE = 0.02


def rank_within(w: F64, b: F64, c: Covariances, tolerance: float) -> int | None:
    """The smallest rank whose truncation adds at most ``tolerance`` of its own error to the fit of W and b.

    The errors of a fit and of its truncation are uncorrelated, so they add. Ranks are multiples of about a sixteenth of
    the width (of 32 where it is large). None where no rank below half the width, which two factors need to be smaller
    than W, is enough.
    """
    d = len(w)
    c_output = w @ c.c_uu @ w.T
    values = np.clip(np.linalg.eigvalsh(0.5 * (c_output + c_output.T)), 0, None)
    energy = float(np.trace(c.c_vv))
    allowed = tolerance * error_of_map(w, b, c) * energy
    step = d // 16 // 32 * 32 or max(1, d // 16)
    lost = np.cumsum(values)  # ascending: what is lost without so many directions
    return next((r for r in range(step, (d + 1) // 2, step) if lost[d - r - 1] <= allowed), None)


def error_of_map(w: F64, b: F64, c: Covariances) -> float:
    """E‖y - W u - b‖² / E‖y - μ_y‖² on the tokens of the covariances ``c``, which may differ from those of the fit."""
    # C_ee = C_yy - W C_xy - C_yx Wᵀ + W C_xx Wᵀ holds for any W; only its trace and the error of the mean are needed.
    error = np.trace(c.c_vv) - 2 * np.sum(w * c.c_vu) + np.sum((w @ c.c_uu) * w)
    error += float(np.sum((c.mean_v - w @ c.mean_u - b) ** 2))
    energy = np.trace(c.c_vv)
    if not (np.isfinite(error) and np.isfinite(energy)):
        raise UnusableMoments("its error or the variance of its output is NaN or infinite")
    return float(max(error, 0.0) / energy) if energy > 0 else 0.0


def ridge_by_heldout_error(
    moments: LayerMoments, others: LayerMoments, fit_input: FitInput, ridges: Sequence[float] = RIDGES
) -> float:
    """The λ of ``ridges`` whose fit on ``moments`` has the smallest error on ``others``, the moments of other text.

    Raises the errors of :func:`fit_lmmse`.
    """
    # Nothing is fitted on the other text, so it may have fewer tokens than the input has channels.
    heldout = branch_covariances(others, fit_input, enough=False)

    def error(ridge: float) -> float:
        fit = fit_lmmse(moments, fit_input, ridge)
        return error_of_map(fit.w, fit.b, heldout)

    return min(ridges, key=error)


def cca_bound(moments: LayerMoments, ridge: float = DEFAULT_RIDGE) -> tuple[float, float]:
    """The paper's bound Σ (1 - ρ²) between h and y + h, and the λ used.

    Two triangular solves and a Frobenius norm: with Cholesky factors C_hh = L Lᵀ and
    C_(y+h)(y+h) = M Mᵀ, Σρ² = ‖M⁻¹ C_(y+h)h L⁻ᵀ‖². Raises the errors of :func:`fit_lmmse`.
    """
    c = stream_covariances(moments)

    def solve(ridge: float) -> tuple[float, float]:
        low_u = np.linalg.cholesky(_regularized(c.c_uu, c.power_u, ridge))
        low_v = np.linalg.cholesky(_regularized(c.c_vv, c.power_v, ridge))
        half = scipy.linalg.solve_triangular(low_v, c.c_vu, lower=True)
        whitened = scipy.linalg.solve_triangular(low_u, half.T, lower=True)
        return float(np.sum(whitened**2)), ridge

    rho2, used = _with_growing_ridge(solve, ridge)
    return len(c.mean_u) - rho2, used


def branch_covariances(m: LayerMoments, fit_input: FitInput, enough: bool = True) -> Covariances:
    """Covariances of the attention branch: its input (normed x or residual h) and its output y.

    With ``enough``, raises :class:`UnusableMoments` if there are too few tokens for a fit.
    """
    u, uu, yu = (m.x, m.xx, m.yx) if fit_input == "normed" else (m.h, m.hh, m.yh)
    return _centred(m.n, u, m.y, uu, yu, m.yy, enough)


def stream_covariances(m: LayerMoments) -> Covariances:
    """Covariances of the residual stream before (h) and after (y + h) the attention."""
    c = branch_covariances(m, "residual")
    c_vu = c.c_vu + c.c_uu
    c_vv = c.c_vv + c.c_vu + c.c_vu.T + c.c_uu
    mean_v = c.mean_u + c.mean_v
    power_v = np.diagonal(c_vv) + mean_v**2
    return Covariances(c.mean_u, mean_v, c.c_uu, c_vu, c_vv, c.power_u, power_v)


def _centred(n: int, u: F64, v: F64, uu: F64, vu: F64, vv: F64, enough: bool = True) -> Covariances:
    d = len(u)
    if not all(np.isfinite(a).all() for a in (u, v, uu, vu, vv)):
        raise UnusableMoments("its moments are NaN or infinite")
    if enough and n < d + 1:
        raise UnusableMoments(
            f"{n:,} calibration tokens cannot determine a linear layer of {d} inputs; at least {d + 1:,} are needed, "
            f"{20 * d:,} or more are advised (raise --samples or --seq-len)"
        )
    mean_u, mean_v = u / n, v / n
    return Covariances(
        mean_u,
        mean_v,
        uu / n - np.outer(mean_u, mean_u),
        vu / n - np.outer(mean_v, mean_u),
        vv / n - np.outer(mean_v, mean_v),
        np.diagonal(uu) / n,
        np.diagonal(vv) / n,
    )


# A channel whose variance is below this share of its mean square is constant: the rest of its variance is float64
# rounding.
_DEAD = 1e-12


def _regularized(c: F64, power: F64, ridge: float) -> F64:
    variance = np.diagonal(c)
    dead = variance <= _DEAD * power
    # A constant channel gets its mean square as variance, so that its coefficient is zero.
    substitute = np.where(power > 0, power, 1.0)
    regularized: F64 = c + np.diag(np.where(dead, substitute, ridge * variance))
    return regularized


def _with_growing_ridge(solve: Callable[[float], tuple[T, float]], ridge: float) -> tuple[T, float]:
    # A ridge of 0 is allowed as the start value: Cholesky then fails on a singular matrix.
    while True:
        try:
            return solve(ridge)
        except np.linalg.LinAlgError:
            ridge = max(ridge * 10, 1e-12)
            if ridge > MAX_RIDGE * 1.0001:
                raise UnusableMoments(
                    f"its covariance is not positive definite, even with a ridge of {MAX_RIDGE:g}"
                ) from None
