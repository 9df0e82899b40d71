"""The ways to fit against least squares on rows of activations that hooks of this file wrote down."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch.arrays import F64
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import ARRAYS
from nbl_export.calibrate.states import OnDisk
from nbl_export.linearize import fits as module
from nbl_export.linearize.fits import WeightedSums, as_layer, sequential_fits, weighted_moments
from nbl_export.linearize.lmmse import LinearFit, branch_covariances, fit_lmmse
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import replaced
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import attention_layers
from nbl_export.models.walk import segments
from nbl_export.models.weights import Stored, streamed
from nbl_export.settings.choices import FitInput
from tests.families import unsaved
from tests.models.test_weights import reads
from tests.tiny_types import tiny_model

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
    block = model.model.layers[index]
    rows: dict[str, list[torch.Tensor]] = {"h": [], "x": [], "y": []}

    def note(name: str) -> Any:
        return lambda _m, args, output=None: rows[name].append(
            (args if output is None else (output,))[0].double()
        )

    hooks = [
        block.input_layernorm.register_forward_pre_hook(note("h")),
        block.input_layernorm.register_forward_hook(note("x")),
        block.self_attn.o_proj.register_forward_hook(note("y")),
    ]
    try:
        with torch.inference_mode(), replaced(model, maps or {}, fit_input):
            for row in TOKENS:
                model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    h, x, y = (torch.cat(rows[name]).reshape(-1, D).numpy() for name in "hxy")
    return h, x, y


def least_squares(u: F64, y: F64, weight: F64 | None = None) -> tuple[F64, F64]:
    """W and b by least squares on the rows, each times the root of its weight, with an intercept column."""
    root = np.sqrt(np.ones(len(u)) if weight is None else weight)[:, None]
    solution = np.linalg.lstsq(np.column_stack([u, np.ones(len(u))]) * root, y * root, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def assert_fit(found: LinearLayer | LinearFit, want: tuple[F64, F64], tolerance: float = 1e-4) -> None:
    for value, expected in ((found.w, want[0]), (found.b, want[1])):
        np.testing.assert_allclose(value, expected, atol=tolerance * np.abs(want[0]).max(), rtol=0)


def solve(fit_input: FitInput) -> Any:
    return lambda _index, moments: fit_lmmse(moments, fit_input, 0.0)


# weighted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_weighted_fit_is_weighted_least_squares(model: Any, fit_input: FitInput) -> None:
    counted: list[int] = []
    moments = dict(weighted_moments(model, TOKENS, fit_input, counted.append))
    assert list(moments) == [0, 1, 2, 3] and sum(counted) == 4 * TOKENS.size
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


def test_weights_are_the_streams_also_where_no_norm_is_before_the_attention() -> None:
    model = unsaved("olmo2").eval().requires_grad_(False)
    normed, residual = (dict(weighted_moments(model, TOKENS, how, lambda _n: None))[1] for how in FIT_INPUTS)
    np.testing.assert_allclose(normed.xx, residual.xx)
    np.testing.assert_allclose(normed.yx, residual.yx)


# sequential --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize("chosen", [(3, 0), (0, 1, 2, 3)], ids=str)
def test_each_layer_is_fitted_behind_those_before_it(
    model: Any, fit_input: FitInput, chosen: tuple[int, ...]
) -> None:
    counted: list[int] = []
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


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_first_layer_is_the_plain_fit(model: Any, fit_input: FitInput) -> None:
    maps = sequential_fits(model, TOKENS, (1, 3), fit_input, solve(fit_input), lambda _n: None)
    plain = fit_lmmse(collect_moments(model, TOKENS).layers[1], fit_input, 0.0)
    assert_fit(maps[1], (plain.w, plain.b))
    assert maps[1].w.dtype == maps[1].b.dtype == np.float32


def _inputs(model: Any, index: int, tokens: Any) -> F64:
    return _observed(model, index, tokens)[0]


def _outputs(model: Any, index: int, tokens: Any) -> F64:
    return _observed(model, index, tokens)[1]


def _observed(model: Any, index: int, tokens: Any) -> tuple[F64, F64]:
    """What an attention module reads and what its output projection writes."""
    from nbl_export.models.layers import attention_layers, hidden_states

    layer = attention_layers(model)[index]
    x: list[torch.Tensor] = []
    y: list[torch.Tensor] = []

    def wrote(_m: Any, _a: Any, output: Any) -> None:
        y.append((output[0] if isinstance(output, tuple) else output).double())

    hooks = [
        model.get_submodule(layer.module).register_forward_pre_hook(
            lambda _m, a, k: x.append(hidden_states(a, k).double()), with_kwargs=True
        ),
        model.get_submodule(layer.output).register_forward_hook(wrote),
    ]
    with torch.inference_mode():
        for row in tokens:
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return tuple(torch.cat(rows).reshape(-1, rows[0].shape[-1]).numpy() for rows in (x, y))  # type: ignore[return-value]


# block by block ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma3-text"])
def test_a_model_that_is_read_block_by_block_has_the_same_fits(name: str) -> None:
    in_memory = unsaved(name).eval().requires_grad_(False)
    low = streamed(Stored(in_memory), torch.float32)
    dummy_run(low)

    def fitted(_index: int, moments: Any) -> LinearFit:
        return fit_lmmse(moments, "normed", 1e-3)

    weighted, sequential = [], []
    for model in (in_memory, low):
        with reads() as found:
            weighted.append(dict(weighted_moments(model, TOKENS, "normed", lambda _n: None)))
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


def test_states_that_have_no_room_are_in_files(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits() -> list[Any]:
        weighted = weighted_moments(model, TOKENS, "normed", lambda _n: None)
        found = sequential_fits(model, TOKENS, (0, 2, 3), "normed", solve("normed"), lambda _n: None)
        return [a for _, m in weighted for a in (m.xx, m.yx)] + [
            a for m in found.values() for a in (m.w, m.b)
        ]

    in_memory, made = fits(), []

    def on_disk(count: int, batch: int, like: torch.Tensor, *_: Any) -> OnDisk:
        assert batch == 2 * TOKENS.shape[1] * D * 4
        made.append(OnDisk(None, count, like))
        return made[-1]

    monkeypatch.setattr(module, "states_for", on_disk)
    assert all(np.array_equal(a, b) for a, b in zip(in_memory, fits(), strict=True))
    assert len(made) == 3, "of the model, and of the two that are fitted in sequence"


def test_only_one_layer_s_sums_are_in_memory(model: Any) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]

    class Counted(WeightedSums):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)
            most[0] = max(most[0], len(alive))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WeightedSums", Counted)
        for _ in weighted_moments(model, TOKENS, "normed", lambda _n: None):
            pass
    assert most == [1]


def test_blocks_that_share_something_are_fitted_in_one_part(model: Any) -> None:
    shared: dict[str, Any] = {}
    together = tiny_model("llama")
    for block in together.model.layers:
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )
    assert len(segments(together)) == 1
    for one, other in zip(
        *(
            [
                *sequential_fits(m, TOKENS, (0, 1, 3), "normed", solve("normed"), lambda _n: None).values(),
                *(
                    as_layer(fit_lmmse(moments, "normed"))
                    for _, moments in weighted_moments(m, TOKENS, "normed", lambda _n: None)
                ),
            ]
            for m in (model, together)
        ),
        strict=True,
    ):
        assert np.array_equal(one.w, other.w) and np.array_equal(one.b, other.b)


# dropped -----------------------------------------------------------------------------------------


def test_a_fit_becomes_a_layer_in_float32(model: Any) -> None:
    moments = collect_moments(model, TOKENS).layers[0]
    fit = fit_lmmse(moments, "normed")
    layer = as_layer(fit)
    assert layer.w.dtype == layer.b.dtype == np.float32
    np.testing.assert_allclose(layer.w, fit.w, rtol=1e-6)
    c = branch_covariances(moments, "normed")
    np.testing.assert_allclose(layer.w @ c.mean_u + layer.b, c.mean_v, atol=1e-3 * np.abs(c.mean_v).max())


def test_a_token_without_energy_does_not_decide_alone() -> None:
    """A zero row of the embedding, as of a padding token: 1 / ‖h‖² is infinite there."""
    model = tiny_model("llama")
    dummy_run(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, 5]] = 0
        model.model.embed_tokens.weight[TOKENS[0, 7]] = 1e-12
    moments = dict(weighted_moments(model, TOKENS, "normed", lambda _n: None))[0]
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
    none = dict(weighted_moments(model, TOKENS, "normed", lambda _n: None))[0]
    assert none.n == TOKENS.size and all(np.isfinite(v).all() for v in (none.x, none.y, none.xx, none.yy))
