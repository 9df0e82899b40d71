"""Low-rank changes of weights: merged while they are asked for, found again in any precision and orientation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from nbl_export.linearize.adapters import adapted, digest_of, is_transposed, weight_digests
from nbl_export.linearize.plan import load_plan, save_plan
from nbl_export.linearize.repair import mlp_maps
from tests.fixtures_graph import load
from tests.linearize.made import adapter_for, make_plan
from tests.tiny_types import tiny_model

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
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        original = model(ids).logits
    with adapted(model, {NAME: adapter}):
        expected = before.double().numpy() + adapter.up.astype(np.float64) @ adapter.down
        near = 1e-6 if dtype == torch.float32 else 1e-2
        assert np.allclose(parameter.detach().double().numpy(), expected, rtol=near, atol=near)
        assert parameter.dtype == dtype
        with torch.inference_mode():
            assert not torch.allclose(model(ids).logits, original, atol=1e-2)
    with pytest.raises(RuntimeError, match="stop"), adapted(model, {NAME: adapter}):
        raise RuntimeError("stop")
    assert torch.equal(parameter, before)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, original)


def test_a_plan_keeps_its_adapters(tmp_path: Path) -> None:
    from dataclasses import replace

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
        ("lfm2", 1, {f"model.layers.{i}.feed_forward.w{p}" for i in (1, 3) for p in (1, 2, 3)}),
    ],
)
def test_the_maps_beside_the_attention(family: str, first: int, expected: set[str]) -> None:
    assert set(mlp_maps(tiny_model(family), first)) == expected


def test_maps_that_keep_their_weight_turned() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    assert mlp_maps(model, 1) == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
