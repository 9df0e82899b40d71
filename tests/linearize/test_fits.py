"""The ways to fit against least squares on rows of activations that hooks of this file wrote down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch import F64
from nbl_export.calibrate.moments import ARRAYS
from nbl_export.linearize.fits import sequential_fits, weighted_moments
from nbl_export.linearize.lmmse import LinearFit, fit_lmmse
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import replaced
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import attention_layers
from nbl_export.models.weights import Stored, streamed
from nbl_export.settings.choices import FitInput
from tests.families import unsaved
from tests.linearize.made import least_squares
from tests.models.test_weights import reads
from tests.tiny_types import activations, tiny_model

FIT_INPUTS: tuple[FitInput, ...] = ("normed", "residual")
D = 32
# An odd number of rows: the last batch is a short one.
TOKENS = np.random.default_rng(0).integers(3, 250, (9, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("llama")
    dummy_run(model)  # whose own run no hook of these tests is to see
    return model


def seen(
    model: Any, index: int, maps: Mapping[int, LinearLayer] | None = None, fit_input: FitInput = "normed"
) -> tuple[F64, F64, F64]:
    """h, x and y of layer ``index``, [tokens, d] each, of the model with ``maps`` before it: whole runs, our hooks."""
    with torch.inference_mode(), activations(model) as kept, replaced(model, maps or {}, fit_input):
        for row in TOKENS:
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    h, x, y = (torch.cat(kept[index][name]).double().reshape(-1, D).numpy() for name in "hxy")
    return h, x, y


def assert_fit(found: LinearLayer | LinearFit, want: tuple[F64, F64], tolerance: float = 1e-4) -> None:
    for value, expected in ((found.w, want[0]), (found.b, want[1])):
        np.testing.assert_allclose(value, expected, atol=tolerance * np.abs(want[0]).max(), rtol=0)


def solve(fit_input: FitInput) -> Any:
    return lambda _index, moments: fit_lmmse(moments, fit_input, 0.0)


# weighted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_weighted_fit_is_weighted_least_squares(model: Any, fit_input: FitInput) -> None:
    moments = dict(weighted_moments(model, TOKENS, fit_input))
    assert list(moments) == [0, 1, 2, 3]
    for index in moments:
        h, x, y = seen(model, index)
        weight = 1 / (h**2).sum(1)
        u = x if fit_input == "normed" else h
        want = least_squares(u, y, weight)
        fit = fit_lmmse(moments[index], fit_input, 0.0)
        assert_fit(fit, want)
        # The weights matter: without them it is another fit.
        plain = least_squares(u, y)[0]
        assert np.abs(plain - want[0]).max() > 1e-2 * np.abs(want[0]).max()
        error = y - u @ want[0].T - want[1]
        mean = np.average(y, axis=0, weights=weight)
        missed = np.average((error**2).sum(1), weights=weight)
        assert fit.nmse == pytest.approx(
            missed / np.average(((y - mean) ** 2).sum(1), weights=weight), rel=1e-4
        )
        assert moments[index].n == TOKENS.size


# sequential --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_each_layer_is_fitted_behind_those_before_it(model: Any, fit_input: FitInput) -> None:
    counted: list[int] = []
    chosen = (3, 0, 1)
    maps = sequential_fits(model, TOKENS, chosen, fit_input, solve(fit_input), counted.append)
    assert sorted(maps) == sorted(chosen)
    assert sum(counted) == TOKENS.size * len(chosen)
    for number, index in enumerate(sorted(chosen)):
        before = {i: maps[i] for i in sorted(chosen)[:number]}
        _, _, target = seen(model, index)  # what the original's attention wrote, on the original's states
        h, x, _ = seen(model, index, before, fit_input)
        u = x if fit_input == "normed" else h
        want = least_squares(u, target)
        assert_fit(maps[index], want, 1e-3)
        if number:
            # Neither the one-shot fit nor one on the changed model's own attention.
            h, x, _ = seen(model, index)
            plain = least_squares(x if fit_input == "normed" else h, target)[0]
            assert np.abs(plain - want[0]).max() > 1e-2 * np.abs(want[0]).max()


# block by block ----------------------------------------------------------------------------------


def test_a_model_that_is_read_block_by_block_has_the_same_fits() -> None:
    in_memory = unsaved("gemma3-text").eval().requires_grad_(False)
    low = streamed(Stored(in_memory), torch.float32)
    dummy_run(low)

    def fitted(_index: int, moments: Any) -> LinearFit:
        return fit_lmmse(moments, "normed", 1e-3)

    weighted, sequential = [], []
    for model in (in_memory, low):
        with reads() as found:
            weighted.append(dict(weighted_moments(model, TOKENS, "normed")))
        assert model is in_memory or set(Counter(found).values()) == {1}
        with reads() as found:
            sequential.append(sequential_fits(model, TOKENS, (0, 2), "normed", fitted, lambda _n: None))
        assert model is in_memory or set(Counter(found).values()) == {1}
        last = attention_layers(model)[3].block
        assert not any(name.startswith(last) for name in found), (
            "nothing behind the last chosen layer is read"
        )
    for index, moments in weighted[0].items():
        assert all(np.array_equal(getattr(moments, a), getattr(weighted[1][index], a)) for a in ARRAYS)
    for index, layer in sequential[0].items():
        other = sequential[1][index]
        assert np.array_equal(layer.w, other.w) and np.array_equal(layer.b, other.b)


# dropped -----------------------------------------------------------------------------------------


def test_a_token_without_energy_does_not_decide_alone() -> None:
    """A zero row of the embedding, as of a padding token: 1 / ‖h‖² is infinite there."""
    model = tiny_model("llama")
    dummy_run(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, 5]] = 0
        model.model.embed_tokens.weight[TOKENS[0, 7]] = 1e-12
    moments = dict(weighted_moments(model, TOKENS, "normed"))[0]
    h, x, y = seen(model, 0)
    energy = (h**2).sum(1)
    assert (energy < 1e-6).sum() >= 2
    first = energy[: 2 * TOKENS.shape[1]]
    median = np.sort(first[first > 0])[(np.count_nonzero(first) - 1) // 2]
    weight = 1 / np.maximum(energy, median / 10)
    weight *= len(weight) / weight.sum()
    assert weight.max() / np.median(weight) <= 11
    np.testing.assert_allclose(moments.x, weight @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.yy, (y * weight[:, None]).T @ y, rtol=1e-4, atol=1e-6)
    # Nothing but such tokens: each counts as the others do.
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    none = dict(weighted_moments(model, TOKENS, "normed"))[0]
    assert none.n == TOKENS.size and all(np.isfinite(v).all() for v in (none.x, none.y, none.xx, none.yy))
