"""The distillation of W and b: its gradient, what it may change and what it may not."""

from __future__ import annotations

import hashlib
import signal
import weakref
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from nbl_export.batch import FIRST
from nbl_export.calibrate.collect import collect_moments
from nbl_export.linearize import repair as module
from nbl_export.linearize.fits import as_layer
from nbl_export.linearize.lmmse import Covariances, branch_covariances, fit_lmmse
from nbl_export.linearize.plan import (
    Adapter,
    LinearLayer,
    digest_of,
    is_transposed,
    load_plan,
    save_plan,
    weight_digests,
)
from nbl_export.linearize.repair import Distillation, Repaired, divergence, mlp_maps
from nbl_export.linearize.swap import adapted, replaced
from nbl_export.models import weights
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.media_tokens import seeing
from nbl_export.models.weights import Stored, streamed
from nbl_export.processes import Checkpoint
from nbl_export.settings.choices import FitInput
from tests.families import unsaved
from tests.fixtures_graph import load
from tests.linearize.made import adapter_for, make_plan
from tests.pictures import plain_tokens
from tests.processes import Recorder, send
from tests.tiny_types import tiny_model

TOKENS = np.random.default_rng(0).integers(3, 250, (12, 48)).astype(np.int32)
NONE: Mapping[str, Adapter] = {}
Fits = tuple[dict[int, LinearLayer], dict[int, Covariances]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP_TOKENS", 4 * TOKENS.shape[1])


def fits(model: Any, chosen: tuple[int, ...], fit_input: FitInput = "normed") -> Fits:
    moments = collect_moments(model, TOKENS).layers
    maps = {i: as_layer(fit_lmmse(moments[i], fit_input, 1e-3)) for i in chosen}
    return maps, {i: branch_covariances(moments[i], fit_input) for i in chosen}


def repair(
    *task: Any, checkpoint: Checkpoint | None = None, identity: str = "", listener: Any = None
) -> Repaired:
    """The distillation of the ``task``: model, maps, covariances, fit input, tokens, steps, seed, rank, exact model."""
    return module.repair(Distillation(*task, identity=identity), checkpoint, listener)


def distance(
    model: Any, maps: dict[int, LinearLayer], fit_input: FitInput, adapters: Mapping[str, Adapter] = NONE
) -> float:
    """Mean KL(original ‖ linearized) over every place, in float64."""
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.inference_mode():
        log_p = model(input_ids=ids).logits.double().log_softmax(-1)
        with replaced(model, maps, fit_input), adapted(model, adapters):
            log_q = model(input_ids=ids).logits.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# the maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_steps_lower_the_divergence_on_the_text(model: Any, fit_input: FitInput) -> None:
    chosen = (0, 1, 2, 3)
    maps, covariances = fits(model, chosen, fit_input)
    listener = Recorder()
    found = repair(model, maps, covariances, fit_input, TOKENS, 30, 0, listener=listener).layers
    assert listener.start == (30, 0) and listener.advanced == [1] * 30
    before = distance(model, maps, fit_input)
    assert distance(model, found, fit_input) < 0.9 * before
    assert all(not np.array_equal(found[i].w, maps[i].w) for i in chosen)
    assert all(not np.array_equal(found[i].b, maps[i].b) for i in chosen)


def test_nothing_is_learned_in_the_places_of_images(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What precedes the embedding of an image predicts it, which nobody reads; the text is read with its images."""
    maps, covariances = fits(model, (1,))
    features = np.random.default_rng(1).standard_normal((4, len(maps[1].b))).astype(np.float32)
    rows = TOKENS[:4].copy()
    rows[1, 10:14] = FIRST + np.arange(4)
    places: list[int] = []
    plain = module.divergence

    def counted(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        places.append(len(logits))
        return plain(logits, target)

    monkeypatch.setattr(module, "divergence", counted)
    with seeing(model, plain_tokens(features)):
        found = [repair(model, maps, covariances, "normed", tokens, 1, 0) for tokens in (TOKENS[:4], rows)]
    assert places == [rows.size, rows.size - 4]
    assert not np.array_equal(found[0].layers[1].b, found[1].layers[1].b)


def test_the_first_step_goes_down_the_gradient_in_the_layers_own_unit(model: Any) -> None:
    """Adam's first step has the size of the rate in every coordinate, against the sign of the gradient there.

    The gradient of V and c is that of the plain formula, worked out by autograd through the map written out.
    """
    maps, covariances = fits(model, (1,))
    c, layer = covariances[1], maps[1]
    found = repair(model, maps, covariances, "normed", TOKENS, 1, 5).layers[1]
    rows = np.random.default_rng(5).permutation(len(TOKENS))[:4]
    ids = torch.from_numpy(TOKENS[rows].astype(np.int64))
    unit = float(np.sqrt(np.trace(c.c_vv) / (32 * np.trace(c.c_uu))))
    v = torch.zeros(32, 32, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.double().log_softmax(-1)
    with replaced(model, maps, "normed") as modules:
        modules[1].weight = (torch.from_numpy(layer.w).double() + unit * v).float()
        modules[1].bias = (torch.from_numpy(layer.b).double() + unit * shift).float()
        log_q = model(input_ids=ids).logits.double().log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None and shift.grad is not None
    # The warm-up's first rate, and the cosine's beginning.
    rate = module._MAP_RATE / 10
    for got, gradient in (
        (found.w - layer.w.astype(float), v.grad),
        (found.b - layer.b.astype(float), shift.grad),
    ):
        want = -rate * unit * gradient.sign().numpy()
        # A sign is uncertain where the gradient is hardly more than rounding: nearly all of the change is alike.
        assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


# the adapters ------------------------------------------------------------------------------------


def test_changes_of_the_mlps_lower_the_divergence_further() -> None:
    model = unsaved("gpt2").eval().requires_grad_(False)
    maps, covariances = fits(model, (1, 2))
    alone, both = (repair(model, maps, covariances, "normed", TOKENS, 40, 0, rank) for rank in (0, 8))
    assert alone.adapters == {}
    assert sorted(both.adapters) == sorted(f"{path}.weight" for path in mlp_maps(model, 1))
    changed = distance(model, both.layers, "normed", both.adapters)
    assert changed < distance(model, alone.layers, "normed")
    for path, adapter in both.adapters.items():
        weight = model.get_parameter(path).numpy()
        assert adapter.change().shape == weight.shape
        assert adapter.digests == weight_digests(weight)


def test_the_weights_behind_are_as_they_were_after_the_repair(model: Any) -> None:
    maps, covariances = fits(model, (2,))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = repair(model, maps, covariances, "normed", TOKENS, 3, 0, 4)
    assert {path.split(".")[2] for path in found.adapters} == {"2", "3"}  # none before the first linear layer
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_seed_gives_the_same_maps_and_another_one_others(model: Any) -> None:
    maps, covariances = fits(model, (0, 2))
    torch.manual_seed(1)
    one = repair(model, maps, covariances, "normed", TOKENS, 5, 0).layers
    torch.manual_seed(2)  # the global generator plays no part
    same, other = (repair(model, maps, covariances, "normed", TOKENS, 5, seed).layers for seed in (0, 1))
    for i in maps:
        np.testing.assert_array_equal(one[i].w, same[i].w)
        np.testing.assert_array_equal(one[i].b, same[i].b)
        assert not np.array_equal(one[i].w, other[i].w)


def test_the_rate_warms_up_and_goes_down() -> None:
    rates = [module._rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.05 < rates[-1] < 0.06


# larger than memory ------------------------------------------------------------------------------


def read_by_block(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "room", lambda *_: 0)
    low = streamed(Stored(model), torch.float32)
    dummy_run(low)  # which reads the weights once itself
    return low


@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_block_by_block_it_is_the_same_to_the_bit(
    fit_input: FitInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unsaved("gemma3-text").eval().requires_grad_(False)
    fitted = fits(model, (1, 2), fit_input)
    whole = repair(model, *fitted, fit_input, TOKENS, 4, 0, 4)
    monkeypatch.setattr(module, "_WHOLE_BYTES", 0)
    assert same(repair(model, *fitted, fit_input, TOKENS, 4, 0, 4), whole), "in memory"
    low = read_by_block(model, monkeypatch)
    assert same(repair(low, *fitted, fit_input, TOKENS, 4, 0, 4), whole), "read block by block"
    assert all(p.is_meta for name, p in low.named_parameters() if ".mlp." in name)


def test_the_backward_pass_has_the_weights_of_one_block(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fits(model, (0, 2))
    low = streamed(Stored(deepcopy(model).bfloat16()), torch.float32)
    dummy_run(low)
    alive: list[weakref.ref[Any]] = []
    most: dict[bool, int] = {}
    plain = weights.Weight.value

    def value(self: Any) -> Any:
        tensor = plain(self)
        alive.append(weakref.ref(tensor.untyped_storage()))
        held = sum(storage.nbytes() for ref in alive if (storage := ref()) is not None)
        most[limited] = max(most.get(limited, 0), held)
        return tensor

    monkeypatch.setattr(weights.Weight, "value", value)
    for limited in (False, True):
        if limited:
            monkeypatch.setattr(module, "room", lambda *_: 0)
        repair(low, *fitted, "normed", TOKENS, 2, 0, 4)
    block, head = (4 * sum(p.numel() for p in m.parameters()) for m in (model.model.layers[0], model.lm_head))
    assert most[True] <= block + head + 4 * 32
    assert most[False] > 3 * block


# interruptions -----------------------------------------------------------------------------------


def same(one: Repaired, other: Repaired) -> bool:
    return all(
        np.array_equal(one.layers[i].w, other.layers[i].w)
        and np.array_equal(one.layers[i].b, other.layers[i].b)
        for i in one.layers
    ) and all(
        np.array_equal(a.up, other.adapters[name].up) and np.array_equal(a.down, other.adapters[name].down)
        for name, a in one.adapters.items()
    )


def again(
    model: Any, fitted: Fits, path: Path, identity: str, listener: Recorder, every_seconds: float = 60.0
) -> Repaired:
    checkpoint = Checkpoint(path, every_seconds)
    return repair(
        model, *fitted, "normed", TOKENS, 8, 0, 4, checkpoint=checkpoint, identity=identity, listener=listener
    )


def test_an_interrupted_repair_goes_on_to_the_same_bits(model: Any, tmp_path: Path) -> None:
    after = 5  # of epochs of three steps
    fitted = fits(model, (1, 2))
    whole = repair(model, *fitted, "normed", TOKENS, 8, 0, 4)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        again(model, fitted, path, "one", Recorder(after, send(signal.SIGTERM)))
    listener = Recorder()
    assert same(again(model, fitted, path, "one", listener), whole)
    assert listener.start == (8, after)
    assert listener.notes == [f"The repair goes on from a checkpoint at {after} steps."]


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_not_used(model: Any, tmp_path: Path) -> None:
    fitted = fits(model, (1, 2))
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        again(model, fitted, path, "one", Recorder(5, send(signal.SIGINT)))
    whole = repair(model, *fitted, "normed", TOKENS, 8, 0, 4)
    other = Recorder()
    assert same(again(model, fitted, path, "other", other), whole)
    assert other.start == (8, 0) and not other.notes
    path.write_bytes(path.read_bytes()[:-1])
    damaged = Recorder()
    assert same(again(model, fitted, path, "one", damaged), whole)
    assert damaged.start == (8, 0)
    assert damaged.notes == ["The checkpoint checkpoint.safetensors is damaged and was ignored."]


# low-rank changes ---------------------------------------------------------------------------------


NAME = "model.layers.2.mlp.down_proj.weight"


def test_digests_tell_every_spelling_of_a_weight_apart() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    adapter = adapter_for(weight)
    assert len(set(adapter.digests)) == 6
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        rounded = weight.astype(dtype)
        for array, turned in ((rounded, False), (np.ascontiguousarray(rounded.T), True), (rounded.T, True)):
            by_hand = hashlib.sha256(array.tobytes()).hexdigest()
            assert digest_of(array) == by_hand
            assert by_hand in adapter.digests
            assert is_transposed(adapter, by_hand) is turned
    assert digest_of(weight + 1e-3) not in adapter.digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_is_there_within_the_block_and_gone_after_it(tiny_folder: Path, dtype: torch.dtype) -> None:
    model: Any = load(tiny_folder).to(dtype)
    parameter = model.get_parameter(NAME)
    before = parameter.detach().clone()
    adapter = adapter_for(before.float().numpy())
    with adapted(model, {NAME: adapter}):
        expected = before.double().numpy() + adapter.up.astype(np.float64) @ adapter.down
        near = 1e-6 if dtype == torch.float32 else 1e-2
        assert np.allclose(parameter.detach().double().numpy(), expected, rtol=near, atol=near)
        assert parameter.dtype == dtype
    with pytest.raises(RuntimeError, match="stop"), adapted(model, {NAME: adapter}):
        raise RuntimeError("stop")
    assert torch.equal(parameter, before)


def test_a_plan_keeps_its_adapters(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    plan = replace(make_plan(), fit="sequential", repair=7, adapters={"a.b.weight": adapter_for(weight)})
    save_plan(tmp_path / "plan.json", plan)
    found = load_plan(tmp_path / "plan.json")
    assert (found.fit, found.repair) == ("sequential", 7)
    adapter = found.adapters["a.b.weight"]
    assert adapter.digests == weight_digests(weight)
    assert np.array_equal(adapter.change(), plan.adapters["a.b.weight"].change())
    assert found.without_layers().adapters == {}


@pytest.mark.parametrize(
    ("family", "first", "expected"),
    [
        ("llama", 2, {f"model.layers.{i}.mlp.{p}_proj" for i in (2, 3) for p in ("gate", "up", "down")}),
        ("gpt2", 1, {f"transformer.h.{i}.mlp.{p}" for i in (1, 2, 3) for p in ("c_fc", "c_proj")}),
        ("lfm2", 1, {f"model.layers.{i}.feed_forward.w{p}" for i in (1, 3) for p in (1, 2, 3)}),
    ],
)
def test_the_maps_beside_the_attention(family: str, first: int, expected: set[str]) -> None:
    assert set(mlp_maps(tiny_model(family), first)) == expected


# the divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [1, 64, 130])
def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(places: int) -> None:
    generator = torch.Generator().manual_seed(places)
    target = torch.randn(places, 53, generator=generator) * 3
    logits = torch.randn(places, 53, generator=generator, requires_grad=True)
    plain = logits.detach().double().requires_grad_()
    log_p = target.double().log_softmax(-1)
    want = (log_p.exp() * (log_p - plain.log_softmax(-1))).sum(-1).mean()
    found = divergence(logits, target)
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    (3 * found).backward()
    (3 * want).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and plain.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), plain.grad.numpy(), atol=1e-6)


def test_the_gradient_of_bfloat16_logits_is_in_bfloat16() -> None:
    logits = torch.randn(70, 31, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    target = torch.zeros(70, 31).bfloat16()
    divergence(logits, target).backward()  # type: ignore[no-untyped-call]
    want = (logits.detach().float().softmax(-1) - 1 / 31) / 70
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    np.testing.assert_allclose(logits.grad.float().numpy(), want.numpy(), atol=1e-4)


def test_the_gradient_takes_the_place_of_the_target() -> None:
    target, logits = torch.randn(70, 31), torch.randn(70, 31, requires_grad=True)
    loss = divergence(logits, target)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and torch.equal(logits.grad, target)
