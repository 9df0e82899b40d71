"""What blocks keep: read from a filled cache, and handed back as one, so that a text goes on where it was left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbl_export.models.caches import (
    BlockCache,
    CacheShape,
    StateShape,
    block_caches,
    cache_layer,
    cache_with,
    entry_in,
    limited_steps,
)
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.libraries import accepted_arguments
from tests.tiny_types import tiny_model

KV, CONV, MATRIX = CacheShape(2, 8, 8), StateShape("conv", (32, 3)), StateShape("recurrent", (4, 8, 8))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("lfm2", [BlockCache(None, (CONV,)), BlockCache(KV)] * 2),
        ("minimax", [BlockCache(None, (MATRIX,)), BlockCache(KV)] * 2),
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


@pytest.mark.parametrize("model_type", ["lfm2", "bamba", "minimax", "falcon_h1", "nemotron_h", "qwen3_next"])
def test_a_text_goes_on_from_its_entries(model_type: str) -> None:
    """A text in two parts, with a cache made anew in between, has the logits of the whole."""
    model: Any = tiny_model(model_type)
    facts, ids = dummy_run(model), torch.arange(2, 25)[None]
    entries = [block.empty(torch.zeros(()), 1) for block in facts.cache]
    found = []
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0]
        for start, stop in ((0, 20), (20, 21), (21, 22), (22, 23)):
            layers = [cache_layer(*block, start) for block in zip(facts.cache, entries, strict=True)]
            cache = cache_with(layers, facts.cache_class)
            given = accepted_arguments(model, position_ids=torch.arange(start, stop)[None])
            part = model(input_ids=ids[:, start:stop], cache=cache, use_cache=True, **given)
            found.append(part.logits[0])
            entries = [entry_in(cache, i, block) for i, block in enumerate(facts.cache)]
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-3, atol=1e-4)


def test_a_step_has_the_limits_of_a_text() -> None:
    """The state after a text and after its tokens one by one; transformers' own steps are 10 % off."""
    model: Any = tiny_model("nemotron_h", time_step_min=0.5)
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


def test_a_state_that_is_handed_over_is_not_overwritten() -> None:
    model: Any = tiny_model("lfm2")
    facts = dummy_run(model)
    entries = [block.empty(torch.zeros(()), 1, 2) for block in facts.cache]
    layers = [cache_layer(*block, 2) for block in zip(facts.cache, entries, strict=True)]
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5]]), cache=cache_with(layers), use_cache=True)
    assert all(not entry[0].any() for entry in entries if len(entry) == 1)


def test_blocks_without_a_cache_keep_nothing() -> None:
    assert block_caches(None, 2) == (BlockCache(), BlockCache())
    assert BlockCache().empty(torch.zeros(()), 3) == ()
    keys, values = BlockCache(CacheShape(2, 8, 4)).empty(torch.zeros((), dtype=torch.float16), 3, 5)
    assert (keys.shape, values.shape, keys.dtype) == ((3, 2, 5, 8), (3, 2, 5, 4), torch.float16)
