"""What replacements cost, against NumPy in float64 and whole runs of the model, token by token."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch import F64, FIRST
from nbl_export.calibrate.synthetic import SyntheticRow
from nbl_export.errors import CalibrationError
from nbl_export.linearize import loss as module
from nbl_export.linearize.loss import LossMeter, compare, loss_of_plan, reference, sums_of
from nbl_export.linearize.plan import Adapter, LinearLayer
from nbl_export.linearize.search import (
    NOISE,
    sensitivity,
)
from nbl_export.linearize.selection import SYNTHETIC, Loss, Sums
from nbl_export.linearize.swap import adapted, replaced
from nbl_export.models import weights
from nbl_export.models.layers import attention_layers, hidden_size
from nbl_export.models.media_tokens import seeing
from nbl_export.models.weights import Stored, streamed
from nbl_export.settings.choices import FitInput
from tests.families import unsaved
from tests.linearize.made import make_plan, random_maps
from tests.models.test_weights import reads
from tests.pictures import plain_tokens
from tests.tiny_types import tiny_model

ROWS, LENGTH, D = 3, 40, 32


def log_softmax(logits: Any) -> F64:
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def by_hand(original: Any, changed: Any, tokens: Any) -> tuple[F64, F64]:
    """KL and increase of the negative log-likelihood at each place but the last, place by place."""
    log_p, log_q = log_softmax(original), log_softmax(changed)
    kl = [float(np.sum(np.exp(log_p[t]) * (log_p[t] - log_q[t]))) for t in range(len(tokens) - 1)]
    excess = [log_p[t, tokens[t + 1]] - log_q[t, tokens[t + 1]] for t in range(len(tokens) - 1)]
    return np.array(kl), np.array(excess)


def ratio_estimate(values: F64, owner: Any) -> tuple[float, float]:
    """Mean and standard error with documents as the sampling unit, written out."""
    mean, documents = float(np.mean(values)), sorted(set(owner.tolist()))
    sums = [sum(v - mean for v, o in zip(values, owner, strict=True) if o == d) for d in documents]
    n = len(documents)
    return mean, math.sqrt(n / (n - 1) * sum(s * s for s in sums)) / len(values)


def predictions(seed: int, length: int = 150, vocab: int = 97, spread: float = 3.0) -> torch.Tensor:
    """More places than are worked on at a time, and not a multiple of them."""
    return torch.randn(length, vocab, generator=torch.Generator().manual_seed(seed)) * spread


# one row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept_in", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("step", [0.01, 0.3, 3.0])
def test_a_row_is_compared_as_in_numpy(kept_in: torch.dtype, close: float, step: float) -> None:
    original, tokens = predictions(0), torch.arange(150) % 97
    changed = original + predictions(1, spread=step)
    next_tokens = tokens[1:]
    kl, excess = compare(reference(original[:-1], next_tokens, kept_in), changed[:-1], next_tokens)
    want_kl, want_excess = by_hand(original.numpy(), changed.numpy(), tokens.numpy())
    assert kl.dtype == excess.dtype == np.float64
    assert kl.shape == excess.shape == (149,)
    # The log-likelihoods are never rounded; the mean divergence evens the rounding of its weights out.
    np.testing.assert_allclose(excess, want_excess, atol=1e-5)
    assert kl.mean() == pytest.approx(want_kl.mean(), rel=close, abs=3e-7)
    if kept_in == torch.float32:
        np.testing.assert_allclose(kl, want_kl, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_costs_nothing_beside_itself(kept_in: torch.dtype) -> None:
    logits, tokens = predictions(2), torch.arange(150) % 97
    kl, excess = compare(reference(logits, tokens, kept_in), logits.clone(), tokens)
    assert np.all(kl == 0) and np.all(excess == 0)


def test_losses_over_documents() -> None:
    rng = np.random.default_rng(0)
    kl, excess = rng.random(60), rng.normal(size=60)
    owner = np.sort(rng.choice([2, 5, 9], 60)).astype(np.int32)
    loss = sums_of(kl, excess, owner).loss
    assert (loss.kl, loss.kl_se) == pytest.approx(ratio_estimate(kl, owner), rel=1e-12)
    assert (loss.excess, loss.excess_se) == pytest.approx(ratio_estimate(excess, owner), rel=1e-12)
    assert loss.perplexity_ratio == pytest.approx(math.exp(loss.excess))
    assert loss.perplexity_ratio_se == pytest.approx(math.exp(loss.excess) * loss.excess_se)
    assert Loss(**loss.as_json()) == loss


# sets of layers ----------------------------------------------------------------------------------


def text(rows: int = ROWS, length: int = LENGTH) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    document = np.sort(rng.choice(6, rows * length)).reshape(rows, length).astype(np.int32)
    return rng.integers(3, 250, (rows, length)).astype(np.int32), document


def run(model: Any, rows: Any) -> list[Any]:
    """The logits of each row, by itself."""
    ids = [torch.from_numpy(row.astype(np.int64))[None] for row in rows]
    with torch.inference_mode():
        return [model(input_ids=row).logits[0].numpy() for row in ids]


def losses(before: Any, after: Any, rows: Any, document: Any) -> tuple[float, ...]:
    """KL and excess with their standard errors, in NumPy."""
    each = [by_hand(o, c, r) for o, c, r in zip(before, after, rows, strict=True)]
    kl, excess = (np.concatenate([e[i] for e in each]) for i in (0, 1))
    owner = document[:, 1:].reshape(-1)
    return (*ratio_estimate(kl, owner), *ratio_estimate(excess, owner))


def whole_run(model: Any, rows: Any, document: Any, maps: Mapping[int, LinearLayer], how: FitInput) -> Loss:
    """The loss by whole runs of both models."""
    original = run(model, rows)
    with replaced(model, maps, how):
        return Loss(*losses(original, run(model, rows), rows, document))


def assert_close(found: Loss, want: Loss) -> None:
    # The original's predictions are kept in bfloat16.
    assert found.kl == pytest.approx(want.kl, rel=3e-3, abs=1e-6)
    assert found.kl_se == pytest.approx(want.kl_se, rel=2e-2, abs=1e-6)
    assert found.excess == pytest.approx(want.excess, rel=1e-4, abs=1e-6)
    assert found.excess_se == pytest.approx(want.excess_se, rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def in_memory(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["in memory", "read block by block"])
def model(in_memory: Any, request: pytest.FixtureRequest) -> Any:
    return streamed(Stored(in_memory), torch.float32) if request.param else in_memory


@pytest.mark.parametrize("how", ["normed", "residual"])
def test_every_set_costs_what_whole_runs_say_in_any_order(model: Any, how: FitInput) -> None:
    maps, (rows, document) = random_maps(*range(4)), text()
    meter = LossMeter(model, rows, document, how)
    assert meter.tokens == ROWS * (LENGTH - 1)
    sets = [s for k in range(5) for s in itertools.combinations(range(4), k)]
    want = {s: whole_run(model, rows, document, {i: maps[i] for i in s}, how) for s in sets}
    assert len({round(w.kl, 9) for w in want.values()}) == len(sets)
    np.random.default_rng(7).shuffle(sets)
    settled = [(), (1,), (0, 2), (), (3,), (0, 1, 2, 3), (2,)]
    for number, chosen in enumerate(sets):
        # Settled now and then on sets that the next ones do or do not add to.
        if number % 2 == 0:
            meter.settle({i: maps[i] for i in settled[number // 2 % len(settled)]})
        assert_close(meter.measure({i: maps[i] for i in chosen}).loss, want[chosen])


def fresh(model: Any, settled: Mapping[int, LinearLayer], how: FitInput = "normed") -> LossMeter:
    meter = LossMeter(model, *text(), how)
    meter.settle(settled)
    return meter


@pytest.mark.parametrize("room", [None, 0])
def test_a_search_settles_on_the_best_set_without_running_it_again(
    in_memory: Any, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = random_maps(*range(4))
    if room is not None:
        monkeypatch.setattr(module, "_NEXT_BYTES", room)
    meter = LossMeter(in_memory, *text(), "normed")
    chosen: dict[int, LinearLayer] = {}
    for _ in range(3):
        tried = {i: meter.measure({**chosen, i: maps[i]}).kl for i in maps if i not in chosen}
        best = min(tried, key=lambda i: tried[i])
        chosen[best] = maps[best]
        ran: list[int] = []
        hook = in_memory.model.layers[best].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        meter.settle(chosen)
        hook.remove()
        assert len(ran) == (0 if room is None else ROWS)
        other = fresh(in_memory, chosen)
        for row, expected in zip(meter._states, other._states, strict=True):
            assert set(row) == set(expected)
            assert all(torch.equal(row[i], expected[i]) for i in row)


def test_parts_of_the_rows_add_up_and_the_first_has_half_of_the_synthetic_ones(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, (rows, document) = random_maps(*range(4)), text()
    synthetic = [
        SyntheticRow(kind, row, np.arange(len(row)) >= 3)
        for kind, row in zip("abab", [*rows, rows[0]], strict=True)
    ]
    meter = LossMeter(model, rows, document, "normed", synthetic=synthetic)
    assert meter.tokens == ROWS * (LENGTH - 1), "of the text"
    assert meter.parts == [meter, None, None], "of a text that is short, all"
    monkeypatch.setattr(module, "_FIRST_TOKENS", LENGTH + 1)
    meter = LossMeter(model, rows, document, "normed", synthetic=synthetic)
    if meter.together:
        assert meter.parts == [meter, None, None]
        return
    there = [part for part in meter.parts if part]
    assert [part.tokens // (LENGTH - 1) for part in there] == [2, ROWS - 2]
    meter.settle({1: maps[1]})
    for layers in ({}, {2: maps[2]}, {1: maps[1], 3: maps[3]}):
        there[0].settle({})
        found = [part.measure(layers) for part in there]
        assert_close(sum(found, Sums()).loss, meter.measure(layers).loss)
        assert found[0].synthetic.keys() == found[1].synthetic.keys() == {"a", "b"}
        assert_close(found[0].loss, whole_run(model, rows[:2], document[:2], layers, "normed"))


def test_of_a_synthetic_row_the_end_is_counted(in_memory: Any) -> None:
    maps, (rows, document) = random_maps(2), text()
    counted = 5
    synthetic = [SyntheticRow("a", rows[0], np.arange(LENGTH) >= counted)]
    meter = LossMeter(in_memory, rows, document, "normed", synthetic=synthetic)
    found = meter.measure(maps)
    owner = np.where(np.arange(LENGTH) < counted, -1, 0)[None]
    want = LossMeter(in_memory, rows[:1], owner, "normed").measure(maps)
    assert found.synthetic == {"a": want.text["0"]} and want.text["0"][0] == LENGTH - counted
    assert found.loss.cost == found.loss.kl + SYNTHETIC * want.loss.kl > 0


def test_logits_are_made_where_they_are_counted_whether_the_head_is_found_or_not(
    in_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, (rows, document), made = random_maps(2), text(), list[int]()
    document[:, : LENGTH - 4] = -1
    head = in_memory.get_output_embeddings()
    hook = head.register_forward_hook(lambda _head, _args, logits: made.append(logits.shape[1]))
    found = LossMeter(in_memory, rows, document, "normed").measure(maps)
    assert set(made) == {4}
    monkeypatch.setattr(in_memory, "get_output_embeddings", lambda: None)
    assert_close(LossMeter(in_memory, rows, document, "normed").measure(maps).loss, found.loss)
    assert set(made) == {4, LENGTH}
    hook.remove()


def test_the_loss_of_a_plan_is_that_of_its_layers(model: Any) -> None:
    maps, (rows, document) = random_maps(1, 3), text()
    plan = replace(make_plan(), hidden_size=D, layer_count=4, layers=maps)
    meter = LossMeter(model, rows, document, "normed")
    assert_close(loss_of_plan(meter, plan), whole_run(model, rows, document, maps, "normed"))
    assert loss_of_plan(meter, replace(plan, layers={})) == meter.measure({}).loss


# block by block ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["normed", "residual"])
def test_a_model_that_is_read_block_by_block_has_the_same_losses(in_memory: Any, how: FitInput) -> None:
    maps, (rows, document) = random_maps(*range(4)), text()
    low = streamed(Stored(in_memory), torch.float32)
    one, other = (LossMeter(m, rows, document, how) for m in (in_memory, low))
    assert (one.together, other.together) == (False, True)
    sets = [{i: maps[i] for i in s} for k in range(4) for s in itertools.combinations(range(4), k)]
    for settled in ({}, {1: maps[1]}, {0: maps[0], 3: maps[3]}):
        for meter in (one, other):
            meter.settle(settled)
        with reads() as found:
            together = other.measure_all(sets)
        assert together == [one.measure(layers) for layers in sets], "to the bit"
        assert together == one.measure_all(sets)
        assert set(Counter(found).values()) == {1}, "each weight is read once, for all sets and rows"
    layer = attention_layers(in_memory)[2]
    assert sensitivity(one, layer, 5.0) == sensitivity(other, layer, 5.0)
    assert (
        not any(p.requires_grad for p in low.parameters())
        and not weights._STREAMED[low].weights["lm_head.weight"].users
    )


def test_the_loss_of_a_plan_with_adapters(in_memory: Any) -> None:
    maps, (rows, document) = random_maps(*range(4)), text()
    low = streamed(Stored(in_memory), torch.float32)
    name = "model.layers.2.mlp.down_proj.weight"
    out, into = in_memory.get_parameter(name).shape
    change = Adapter(np.full((out, 1), 0.05, np.float32), np.ones((1, into), np.float32), ())
    found = []
    for model in (in_memory, low):
        meter = LossMeter(model, rows, document, "normed")

        @contextmanager
        def planned(model: Any = model) -> Iterator[None]:
            with replaced(model, {1: maps[1]}, "normed"), adapted(model, {name: change}):
                yield

        found.append(meter.measure_within(planned(), 1))
        assert meter.measure({1: maps[1]}) != found[-1]
    assert found[0] == found[1]


# large predictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("by_block", [False, True], ids=["in memory", "read block by block"])
def test_large_predictions_are_made_again_row_by_row_to_the_bit(
    by_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = unsaved("gpt2").eval().requires_grad_(False)
    model = streamed(Stored(plain), torch.float32) if by_block else plain
    maps, (rows, document) = random_maps(*range(4), d=hidden_size(plain)), text()
    sets = [{}, {1: maps[1]}, {0: maps[0], 2: maps[2]}, maps]
    found = []
    for bytes_kept in (0, 1 << 30):
        monkeypatch.setattr(module, "_KEPT_BYTES", bytes_kept)
        meter = LossMeter(model, rows, document, "normed")
        losses = meter.measure_all(sets)
        meter.settle({1: maps[1]})
        found.append([*losses, *meter.measure_all(sets), sensitivity(meter, attention_layers(model)[2], 5.0)])
    assert found[0] == found[1] and found[0][0].loss == Loss(0, 0, 0, 0)


# noise -------------------------------------------------------------------------------------------


def test_noise_against_a_run_with_the_noise_added_by_hand() -> None:
    model, (rows, document) = tiny_model("llama"), text()
    layer, energy = attention_layers(model)[2], 7.0
    meter = LossMeter(model, rows, document, "normed")
    found = sensitivity(meter, layer, energy).loss
    drawn: list[torch.Tensor] = []
    inner = model.model.layers[2].self_attn.o_proj
    original = inner.forward
    generator = torch.Generator().manual_seed(2)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn((*x.shape[:-1], D), generator=generator)
        drawn.append(noise * math.sqrt(NOISE * energy / D))
        return original(x) + drawn[-1]

    before = run(model, rows)
    inner.forward = noisy
    after = run(model, rows)
    del inner.forward
    assert_close(found, Loss(*(v / NOISE for v in losses(before, after, rows, document))))
    per_token = torch.cat(drawn).square().sum(-1).mean()
    assert float(per_token) == pytest.approx(NOISE * energy, rel=0.05)


def test_predictions_that_are_no_numbers_are_the_models_own() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    rows = np.random.default_rng(0).integers(3, 250, (ROWS, LENGTH)).astype(np.int32)
    with pytest.raises(
        CalibrationError, match=r"own predictions are NaN or infinite in row 0 of the selection text"
    ):
        LossMeter(model, rows, np.zeros_like(rows), "normed")


@pytest.mark.parametrize("kept", [1 << 30, 0], ids=["predictions", "states"])
def test_tokens_of_images_are_seen_and_not_predicted(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is that of the words alone, each by what the model makes of the images before it."""
    monkeypatch.setattr(module, "_KEPT_BYTES", kept)
    model: Any = tiny_model("llama")
    d, numbers = hidden_size(model), np.random.default_rng(0)
    features = numbers.standard_normal((9, d)).astype(np.float32)
    images = plain_tokens(features)
    rows = numbers.integers(3, 30, (3, 20)).astype(np.int32)
    rows[0, 4:8], rows[2, 9:14] = FIRST + np.arange(4), FIRST + 4 + np.arange(5)
    owner = np.where(rows >= FIRST, -1, np.arange(3)[:, None]).astype(np.int32)
    layers = {1: LinearLayer(np.zeros((d, d), np.float32), np.zeros(d, np.float32))}
    with seeing(model, images):
        found = LossMeter(model, rows, owner, "normed").measure(layers).loss

    kl, excess, owners = [], [], []
    for row, of in zip(rows, owner, strict=True):
        there = torch.from_numpy(row >= FIRST)
        ids = torch.from_numpy(np.where(row >= FIRST, 0, row).astype(np.int64))
        embeds = model.get_input_embeddings()(ids[None]).detach().clone()
        embeds[0, there] = torch.from_numpy(features[row[row >= FIRST] - FIRST])
        with torch.inference_mode():
            original = model(inputs_embeds=embeds).logits[0]
            with replaced(model, layers, "normed"):
                changed = model(inputs_embeds=embeds).logits[0]
        pair = by_hand(original, changed, ids.numpy())
        word = ~there.numpy()[1:]
        kl.append(pair[0][word])
        excess.append(pair[1][word])
        owners.append(of[1:][word])
    expected = sums_of(np.concatenate(kl), np.concatenate(excess), np.concatenate(owners)).loss
    assert found.kl == pytest.approx(expected.kl, rel=5e-3) and found.kl > 0.01
    assert found.excess == pytest.approx(expected.excess, abs=1e-4)
    assert found.kl_se == pytest.approx(expected.kl_se, rel=5e-3)
