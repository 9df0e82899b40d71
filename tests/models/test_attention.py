"""Attention that is replaced or watched: fast decoding, borrowed keys, and each row's own positions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.models.attention import count_positions, decoding, shared_keys, takes_attention
from nbl_export.models.layers import attention_layers
from nbl_export.models.libraries import cache_argument
from tests.alone import furthest, own_logits, rows_of
from tests.tiny_types import tiny_model


def decoded(model: Any, rows: torch.Tensor, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """The logits of a prefill of ``rows`` and of one token after it."""
    with torch.inference_mode():
        first = model(input_ids=rows, use_cache=True)
        name = cache_argument(model)
        following = model(input_ids=ids, **{name: first[name]}, **given)
        return torch.cat([first.logits[:, -1], following.logits[:, -1]]).float()


def model_of(model_type: str, dtype: torch.dtype) -> Any:
    return tiny_model(model_type).to(dtype)


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


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_a_token_attends_as_in_pytorch(model_type: str, products: list[tuple[int, ...]]) -> None:
    model = model_of(model_type, torch.bfloat16)
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


def test_what_is_not_such_a_token_goes_to_pytorch(products: list[tuple[int, ...]]) -> None:
    rows = torch.arange(3 * 9).reshape(3, 9) % 200 + 5
    ids = torch.tensor([[7], [8], [9]])
    exact = model_of("llama", torch.float32)
    plain = decoded(exact, rows, ids)
    with decoding(exact):
        assert torch.equal(decoded(exact, rows, ids), plain)
    half = model_of("llama", torch.bfloat16)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    plain = decoded(half, rows, ids, attention_mask=mask)
    with decoding(half):
        assert torch.equal(decoded(half, rows, ids, attention_mask=mask), plain)
    assert not products


# borrowed keys -----------------------------------------------------------------------------------

IDS = torch.arange(8)[None] + 3


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("gemma3n_text", {2: 0, 3: 1}), ("gemma4_text", {2: 0, 3: 1}), ("llama", {}), ("gemma2", {})],
)
@pytest.mark.parametrize("cached", [True, False])
def test_who_borrows_from_whom(model_type: str, expected: dict[int, int], cached: bool) -> None:
    model = tiny_model(model_type)
    before = model.config._attn_implementation
    with torch.inference_mode():
        own = model(input_ids=IDS).logits
        found = shared_keys(model, attention_layers(model), lambda: model(input_ids=IDS, use_cache=cached))
        assert found == expected
        assert model.config._attn_implementation == before
        assert torch.equal(model(input_ids=IDS).logits, own)  # nothing of it is left on the model


# positions ---------------------------------------------------------------------------------------

LLAMA_4 = "llama4_text"  # its temperature begins at 100 tokens, its chunks have 64
# One with a rotary embedding, and one with a temperature.
TWO_LAYERS = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}
FORMS_OF_IT = ("concat", "static", "none")


@pytest.fixture
def model() -> Any:
    return tiny_model(LLAMA_4, **TWO_LAYERS)


@pytest.mark.parametrize("form", FORMS_OF_IT)
def test_the_temperature_follows_each_rows_positions(model: Any, form: str, tmp_path: Path) -> None:
    # Decoding crosses 100 in the second row, and so do the padded places of the third, whose positions do not.
    rows = rows_of(135, 104, 60, 99)
    assert furthest(model, tmp_path, form, rows, steps=5) < 1e-4


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
    assert [len(block._forward_pre_hooks) for block in model.model.layers] == [1] * 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo", "mixtral"])
def test_other_models_are_left_alone(name: str) -> None:
    other = tiny_model(name)
    count_positions(other)
    assert not any(module._forward_pre_hooks for module in other.modules())
