"""Attention that is replaced or watched, passes with an explicit cache in pieces, and routers that are told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.models.attention import Routers, count_positions, decoding, takes_attention
from nbl_export.models.dummy_run import BlockCache, CacheShape, StateShape, dummy_run
from nbl_export.models.forward import limited_steps, run_with_past
from nbl_export.models.running import cache_argument
from tests.alone import furthest, own_logits, rows_of
from tests.tiny_types import tiny_model


def decoded(model: Any, rows: torch.Tensor, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """The logits of a prefill of ``rows`` and of one token after it."""
    with torch.inference_mode():
        first = model(input_ids=rows, use_cache=True)
        name = cache_argument(model)
        following = model(input_ids=ids, **{name: first[name]}, **given)
        return torch.cat([first.logits[:, -1], following.logits[:, -1]]).float()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries of each group that is one product."""
    seen: list[tuple[int, ...]] = []
    real = torch.bmm

    def bmm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(one.shape))
        return real(one, other)

    monkeypatch.setattr(torch, "bmm", bmm)
    return seen


def test_a_token_attends_as_in_pytorch(products: list[tuple[int, ...]]) -> None:
    model = tiny_model("qwen3").to(torch.bfloat16)
    rows = torch.arange(3 * 9).reshape(3, 9) % 200 + 5
    ids = torch.tensor([[7], [8], [9]])
    assert model.config._attn_implementation == "sdpa" and takes_attention(model)
    plain = decoded(model, rows, ids)
    assert not products
    with decoding(model):
        fast = decoded(model, rows, ids)
    layers = model.config.num_hidden_layers
    assert len(products) == 2 * layers, "of the prefill none, of the token all"
    groups = model.config.num_key_value_heads
    assert products[0][0] == 3 * groups
    assert products[0][1] == model.config.num_attention_heads // groups
    assert torch.equal(fast[:3], plain[:3])
    step = 2.0**-8 * float(plain.abs().max())  # of bfloat16
    torch.testing.assert_close(fast, plain, atol=4 * step, rtol=0)
    assert not torch.equal(decoded(model, rows, ids + 1), plain), "a wrong token is seen"
    assert model.config._attn_implementation == "sdpa"


# positions ---------------------------------------------------------------------------------------

# One with a rotary embedding, and one with a temperature.
TWO_LAYERS = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}


@pytest.fixture
def model() -> Any:
    """Its temperature begins at 100 tokens, its chunks have 64."""
    return tiny_model("llama4_text", **TWO_LAYERS)


def test_the_temperature_follows_each_rows_positions(model: Any, tmp_path: Path) -> None:
    # Decoding crosses 100 in the second row, and so do the padded places of the third, whose positions do not.
    rows = rows_of(135, 104, 60, 99)
    assert furthest(model, tmp_path, "concat", rows, steps=5) < 1e-4


def test_padded_rows_of_pytorch_are_the_rows_alone(model: Any) -> None:
    long, short = rows_of(130, 105)
    alone = own_logits(model, short)
    ids = torch.from_numpy(np.stack([long, np.r_[np.full(25, 1), short]]))
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clip(0)}

    def off(found: Any) -> float:
        with torch.inference_mode():
            return float(np.abs(found(**batch).logits[1, 25:].numpy() - alone).max())

    assert off(model) > 0.01  # transformers' own
    count_positions(model)
    count_positions(model)  # a second time
    assert off(model) < 1e-4
    assert off(copy.deepcopy(model)) < 1e-4
    np.testing.assert_array_equal(own_logits(model, short), alone)
    assert [len(block._forward_pre_hooks) for block in model.model.layers] == [0, 1]
    other = tiny_model("mixtral")
    count_positions(other)
    assert not any(module._forward_pre_hooks for module in other.modules())


# passes with a cache ------------------------------------------------------------------------------


KV, CONV, MATRIX = CacheShape(2, 8, 8), StateShape("conv", (32, 3)), StateShape("recurrent", (4, 8, 8))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("lfm2", [BlockCache(None, (CONV,)), BlockCache(KV)] * 2),
        ("minimax", [BlockCache(None, (MATRIX,)), BlockCache(KV)] * 2),
        ("deepseek_v2", [BlockCache(CacheShape(1, 12, 4))] * 4),  # what all heads share, and its rotary part
        (
            "falcon_h1",
            [BlockCache(KV, (StateShape("conv", (80, 4)), StateShape("recurrent", (4, 16, 8))))] * 4,
        ),
    ],
)
def test_each_block_keeps_what_its_cache_layer_holds(model_type: str, expected: list[BlockCache]) -> None:
    facts = dummy_run(tiny_model(model_type))
    assert list(facts.cache) == expected
    assert (facts.cache_class is None) == (model_type != "minimax")


@pytest.mark.parametrize(
    "model_type", ["llama", "lfm2", "bamba", "minimax", "falcon_h1", "nemotron_h", "qwen3_next"]
)
def test_a_text_goes_on_from_its_entries(model_type: str) -> None:
    """A text in parts, with a cache made anew in between, has the logits of the whole."""
    model: Any = tiny_model(model_type)
    ids, found = torch.arange(2, 25)[None], []
    entries = [block.empty(torch.zeros(()), 1) for block in dummy_run(model).cache]
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0]
        for start, stop in ((0, 20), (20, 21), (21, 22), (22, 23)):
            mask, positions = torch.ones(1, stop, dtype=torch.long), torch.arange(start, stop)[None]
            logits, entries = run_with_past(model, ids[:, start:stop], mask, positions, entries, start)
            found.append(logits[0])
    assert model_type != "llama" or {t.shape for pair in entries for t in pair} == {(1, 2, 23, 8)}
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-3, atol=1e-4)


def test_a_step_has_the_limits_of_a_text() -> None:
    """The state after a text and after its tokens one by one; transformers' own steps are 10 % off."""
    # The second limit is read by transformers 5.25, the first by what came before.
    model: Any = tiny_model("nemotron_h", time_step_min=0.5, time_step_limit=(0.5, float("inf")))
    ids = torch.arange(2, 12)[None]

    def state(parts: list[slice]) -> torch.Tensor:
        cache = None
        for part in parts:
            given = {} if cache is None else {"cache": cache}
            positions = torch.arange(10)[None, part]
            cache = model(input_ids=ids[:, part], position_ids=positions, use_cache=True, **given).cache
        found: torch.Tensor = cache.layers[0].recurrent_states[0]
        return found.clone()

    one_by_one = [slice(0, 2), *(slice(i, i + 1) for i in range(2, 10))]
    with torch.inference_mode():
        whole, own = state([slice(0, 10)]), state(one_by_one)
        with limited_steps(model):
            limited = state(one_by_one)
        again = state(one_by_one)
    assert (own - whole).norm() > 0.05 * whole.norm()
    torch.testing.assert_close(limited, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, own, rtol=0, atol=0)


# routers ------------------------------------------------------------------------------------------


REAL = np.array([[False, True], [True, True]])
SCORES = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [6.0, 4.0, 5.0], [1.0, 2.0, 2.5]])


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3)])
def test_choices_of_real_tokens_are_kept(shape: tuple[int, ...]) -> None:
    routers = Routers([REAL, REAL])
    with routers:
        SCORES.topk(2)  # before any pass
        routers.begin()
        values, places = torch.topk(SCORES.reshape(shape), 2, dim=-1)
        torch.topk(SCORES, 2, dim=0)  # over tokens: none of a router
        routers.begin()
        SCORES.reshape(shape).topk(1)
    assert values.shape == places.shape == (*shape[:-1], 2)
    (first, other), (last,) = routers.passes
    assert other is None and first is not None and last is not None
    assert first.own.tolist() == [[1, 2], [0, 2], [2, 1]]
    assert np.array_equal(first.scores, SCORES.numpy()[1:])
    assert routers.chosen()[1][0].tolist() == [[1], [0], [2]]  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3)])
def test_what_is_told_is_chosen_and_weighed_by_the_own_scores(shape: tuple[int, ...]) -> None:
    told = np.array([[0, 2], [0, 1], [1, 2]])
    routers = Routers([REAL], [[told]])
    with routers:
        routers.begin(0)
        found = torch.topk(SCORES.reshape(shape), 2)
        more = torch.topk(SCORES, 1)  # nothing is said of a second router
    # The first token is padding.
    assert found.indices.reshape(4, 2).tolist() == [[0, 1], [0, 2], [0, 1], [1, 2]]
    assert found.values.reshape(4, 2).tolist() == [[9, 8], [1, 2], [6, 4], [2, 2.5]]
    assert more.indices.tolist() == [[0], [1], [0], [2]]
    choice = routers.passes[0][0]
    assert choice is not None and choice.own.tolist() == [[1, 2], [0, 2], [2, 1]]
