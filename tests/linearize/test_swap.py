"""The swapped PyTorch model computes x @ Wᵀ + b in the planned layers, and only while it is asked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.settings.choices import FitInput

D = 32
FIT_INPUTS: tuple[FitInput, ...] = ("normed", "residual")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(2, 20)))


def maps(*layers: int) -> dict[int, LinearLayer]:
    """Maps about as strong as the attention they replace."""
    rng = np.random.default_rng(1)
    return {
        i: LinearLayer(rng.normal(size=(D, D)).astype(np.float32) / 4, rng.normal(size=D).astype(np.float32))
        for i in layers
    }


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
    """A Llama forward pass written out: the attention of ``layers`` is their map, of the others softmax."""
    config = model.config
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    head = D // heads
    length = ids.shape[1]
    angle = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(0, head, 2) / head)
    cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()
    causal = torch.full((length, length), -torch.inf).triu(1)

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (-1, head)).transpose(1, 2)

    def rotate(t: torch.Tensor) -> torch.Tensor:
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat([-second, first], -1) * sin

    def norm(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return t / (t.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    weights = {name: value.double() for name, value in model.state_dict().items()}
    h = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if f"layers.{i}." in k}
        x = norm(h, w["input_layernorm.weight"])
        if i in layers:
            u = x if fit_input == "normed" else h
            y = u @ torch.from_numpy(layers[i].w).double().T + torch.from_numpy(layers[i].b).double()
        else:
            q, k, v = (split(x @ w[f"self_attn.{p}_proj.weight"].T) for p in "qkv")
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
            scores = rotate(q) @ rotate(k).transpose(-1, -2) / head**0.5 + causal
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T
        h = h + y
        z = norm(h, w["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(z @ w["mlp.gate_proj.weight"].T)
        h = h + (gate * (z @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(h, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize("chosen", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_the_swapped_model_is_the_one_written_out(
    model: Any, ids: torch.Tensor, fit_input: FitInput, chosen: tuple[int, ...]
) -> None:
    layers = maps(*chosen)
    want = by_hand(model, ids, layers, fit_input)
    with linearized(model, make_plan(layers, fit_input)) as swapped:
        got = logits(swapped, ids)
    assert distance(got, want) < 1e-4


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_swap_tells_apart_what_it_must(model: Any, ids: torch.Tensor, fit_input: FitInput) -> None:
    layers = maps(1, 3)
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
    plan = make_plan(maps(0, 2), fit_input)
    with linearized(model, plan):
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ZeroDivisionError), linearized(model, plan):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), before)
    assert state() == modules


def test_a_swap_that_fails_half_way_is_undone(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    layers = maps(0, 2)
    layers[2] = LinearLayer("no array", layers[2].b)  # type: ignore[arg-type]
    with pytest.raises(TypeError), linearized(model, make_plan(layers, "residual")):
        pytest.fail("entered")
    assert torch.equal(logits(model, ids), before)


def test_a_plan_without_layers_changes_nothing(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    with linearized(model, make_plan({})):
        assert torch.equal(logits(model, ids), before)


def test_weights_take_the_type_of_the_model(tiny_folder: Path, ids: torch.Tensor) -> None:
    model: Any = load_model(find_model(str(tiny_folder))).double()
    layers = maps(1, 3)
    with linearized(model, make_plan(layers)):
        got = logits(model, ids)
    assert got.dtype == torch.float64
    assert distance(got, by_hand(model, ids, layers, "normed")) < 1e-6  # the rotation stays float32


@pytest.mark.parametrize(
    ("count", "width", "plan"), [(5, D, "5 layers of width 32"), (4, 64, "4 layers of width 64")]
)
def test_a_plan_for_another_model_is_refused(
    model: Any, ids: torch.Tensor, count: int, width: int, plan: str
) -> None:
    before = logits(model, ids)
    with pytest.raises(InputError) as caught, linearized(model, make_plan({}, "normed", count, width)):
        pytest.fail("entered")
    message = str(caught.value)
    assert f"The plan is for {plan}; this model has 4 of width 32" in message
    assert "run `nbl-export select` for this model" in message
    assert torch.equal(logits(model, ids), before)
