"""The swapped model computes x @ Wᵀ + b in the planned layers; fits are least squares on rows of its activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch import F64
from nbl_export.calibrate.moments import ARRAYS
from nbl_export.errors import InputError
from nbl_export.linearize.fits import sequential_fits, weighted_moments
from nbl_export.linearize.lmmse import LinearFit, fit_lmmse
from nbl_export.linearize.plan import Adapter, LinearLayer, Plan
from nbl_export.linearize.swap import ORIGINAL, Version, adapted, linearized, replaced, sweep
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import attention_layers
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.weights import Stored, streamed
from nbl_export.settings.choices import FitInput
from tests.families import unsaved
from tests.fixtures_graph import maps_in_place
from tests.linearize.made import least_squares, random_maps
from tests.models.test_weights import reads
from tests.processes import Notes
from tests.tiny_types import activations, tiny_model

D = 32
FIT_INPUTS: tuple[FitInput, ...] = ("normed", "residual")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(2, 20)))


def make_plan(
    layers: Mapping[int, LinearLayer], fit_input: FitInput = "normed", count: int = 4, width: int = D
) -> Plan:
    return Plan(
        model="", hidden_size=width, layer_count=count, fit_input=fit_input, criterion="cca", ridge=1e-6,
        calibration_tokens=1, layers=layers, probe={}, probe_u={}, probe_y={},
    )  # fmt: skip


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def by_hand(
    model: Any, ids: torch.Tensor, layers: Mapping[int, LinearLayer], fit_input: FitInput
) -> torch.Tensor:
    """The original model, what whose attention of ``layers`` returns is W u + b instead, by hooks."""
    with maps_in_place(model, make_plan(layers, fit_input)):
        return logits(model, ids)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize("chosen", [(), (1, 3), (0, 1, 2, 3)])
def test_the_swapped_model_is_the_one_written_out(
    model: Any, ids: torch.Tensor, fit_input: FitInput, chosen: tuple[int, ...]
) -> None:
    layers = random_maps(*chosen)
    want = by_hand(model, ids, layers, fit_input)
    with linearized(model, make_plan(layers, fit_input)) as swapped:
        got = logits(swapped, ids)
    assert distance(got, want) < 1e-4


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_swap_tells_apart_what_it_must(model: Any, ids: torch.Tensor, fit_input: FitInput) -> None:
    layers = random_maps(1, 3)
    with linearized(model, make_plan(layers, fit_input)):
        got = logits(model, ids)
    nothing = {i: LinearLayer(np.zeros((D, D), np.float32), np.zeros(D, np.float32)) for i in layers}
    transposed = {i: LinearLayer(np.ascontiguousarray(m.w.T), m.b) for i, m in layers.items()}
    no_bias = {i: LinearLayer(m.w, np.zeros_like(m.b)) for i, m in layers.items()}
    other_input: FitInput = "residual" if fit_input == "normed" else "normed"
    others = {
        "the original": by_hand(model, ids, {}, fit_input),
        "no attention": by_hand(model, ids, nothing, fit_input),
        "W transposed": by_hand(model, ids, transposed, fit_input),
        "no bias": by_hand(model, ids, no_bias, fit_input),
        "one layer only": by_hand(model, ids, {1: layers[1]}, fit_input),
        "maps exchanged": by_hand(model, ids, {1: layers[3], 3: layers[1]}, fit_input),
        "the other input": by_hand(model, ids, layers, other_input),
    }
    for what, other in others.items():
        assert distance(got, other) > 0.05, what


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_original_comes_back(model: Any, ids: torch.Tensor, fit_input: FitInput) -> None:
    def state() -> list[tuple[str, int, int, int]]:
        return [
            (name, id(m), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]

    before, modules = logits(model, ids), state()
    plan = make_plan(random_maps(0, 2), fit_input)
    with linearized(model, plan):
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ZeroDivisionError), linearized(model, plan):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), before)
    assert state() == modules


@pytest.mark.parametrize(
    ("count", "width", "plan"), [(5, D, "5 layers of width 32"), (4, 64, "4 layers of width 64")]
)
def test_a_plan_for_another_model_is_refused(model: Any, count: int, width: int, plan: str) -> None:
    said = f"The plan is for {plan}; this model has 4 of width 32.*run `nbl-export select` for this model"
    with pytest.raises(InputError, match=said), linearized(model, make_plan({}, "normed", count, width)):
        pytest.fail("entered")


# versions -----------------------------------------------------------------------------------------


DOWN = "model.layers.2.mlp.down_proj.weight"
ROWS = [torch.arange(3 + i, 15 + 2 * i) for i in range(3)]


@pytest.fixture(scope="module")
def in_memory() -> Any:
    model = tiny_model("llama")
    dummy_run(model)  # the first walk makes it, by a pass of its own
    return model


@pytest.fixture(params=[False, True], ids=["in memory", "read block by block"])
def either(in_memory: Any, request: pytest.FixtureRequest) -> Any:
    return streamed(Stored(in_memory), torch.float32) if request.param else in_memory


def change(size: float) -> dict[str, Adapter]:
    return {DOWN: Adapter(np.full((D, 1), size, np.float32), np.ones((1, 48), np.float32), ())}


def swept(model: Any, versions: list[Version], **options: Any) -> dict[tuple[int, int], torch.Tensor]:
    found = {
        (row, which): out.clone() for row, which, out in sweep(model, ROWS, versions, "normed", **options)
    }
    assert len(found) == len(ROWS) * len(versions)
    return found


def test_versions_are_whole_runs_and_weights_are_read_once(in_memory: Any) -> None:
    model, linear = streamed(Stored(in_memory), torch.float32), random_maps(*range(4))
    settled = {1: linear[1]}
    wanted = [
        (Version(0), {}, {}),
        (Version(1, settled), settled, {}),
        (Version(2, {1: linear[1], 3: linear[3]}, change(0.05)), {1: linear[1], 3: linear[3]}, change(0.05)),
        (Version(2, settled, change(0.1)), settled, change(0.1)),
        (Version(0, {0: linear[0]}), {0: linear[0]}, {}),
    ]
    lengths: list[int] = []
    notes = Notes()
    with reads() as found:
        ours = swept(
            model,
            [version for version, *_ in wanted],
            settled=settled,
            advance=lengths.append,
            listener=notes,
        )
    blocks = in_memory.config.num_hidden_layers
    assert notes.tasks == [("Running the blocks", blocks, "blocks", 0)] and notes.advanced == [1] * blocks
    assert set(Counter(found).values()) == {1} and lengths == [len(row) for row in ROWS]
    for which, (_, layers, adapters) in enumerate(wanted):
        with replaced(in_memory, layers, "normed") if layers else nullcontext(), adapted(in_memory, adapters):
            for number, row in enumerate(ROWS):
                assert torch.equal(ours[number, which], logits(in_memory, row[None])[0]), (which, number)
    assert len({float(out.sum()) for (row, _), out in ours.items() if row == 0}) == len(wanted)


def test_a_change_begins_with_its_version_and_ends_with_the_sweep(either: Any) -> None:
    model = either
    before, seen = logits(model, ROWS[0][None])[0], []

    @contextmanager
    def changed() -> Iterator[None]:
        seen.append("begun")
        with adapted(model, change(0.2)):
            yield
        seen.append("ended")

    ours = swept(model, [Version(2, change=changed())])
    assert seen == ["begun", "ended"] and not torch.equal(ours[0, 0], before)
    assert torch.equal(swept(model, [ORIGINAL])[0, 0], before)


# ways to fit -------------------------------------------------------------------------------------

# An odd number of rows: the last batch is a short one.
TOKENS = np.random.default_rng(0).integers(3, 250, (9, 32)).astype(np.int32)


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


# weighted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_weighted_fit_is_weighted_least_squares(in_memory: Any, fit_input: FitInput) -> None:
    moments = dict(weighted_moments(in_memory, TOKENS, fit_input))
    assert list(moments) == [0, 1, 2, 3]
    for index in moments:
        h, x, y = seen(in_memory, index)
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
def test_each_layer_is_fitted_behind_those_before_it(in_memory: Any, fit_input: FitInput) -> None:
    counted: list[int] = []
    chosen = (3, 0, 1)
    maps = sequential_fits(
        in_memory, TOKENS, chosen, fit_input, lambda _, m: fit_lmmse(m, fit_input, 0.0), counted.append
    )
    assert sorted(maps) == sorted(chosen)
    assert sum(counted) == TOKENS.size * len(chosen)
    for number, index in enumerate(sorted(chosen)):
        before = {i: maps[i] for i in sorted(chosen)[:number]}
        _, _, target = seen(in_memory, index)  # what the original's attention wrote, on the original's states
        h, x, _ = seen(in_memory, index, before, fit_input)
        u = x if fit_input == "normed" else h
        want = least_squares(u, target)
        assert_fit(maps[index], want, 1e-3)
        if number:
            # Neither the one-shot fit nor one on the changed model's own attention.
            h, x, _ = seen(in_memory, index)
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
