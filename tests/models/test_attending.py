"""Functions in the place of a model's attention: as fast decoding has them, against PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbl_export.models.attending import attending_by, decoding, takes_attention
from nbl_export.models.compat import cache_argument
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


def test_other_attention_stays_as_it_is(products: list[tuple[int, ...]]) -> None:
    model = model_of("llama", torch.bfloat16)
    model.set_attn_implementation("eager")
    with decoding(model):
        assert model.config._attn_implementation == "eager"
        decoded(model, torch.tensor([[5, 6]]), torch.tensor([[7]]))


def test_the_attention_is_put_back_after_an_error() -> None:
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), attending_by(model, "nbl_export_test", lambda *_, **__: 1 // 0):
        model(input_ids=torch.tensor([[1, 2]]))
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=torch.tensor([[1, 2]]))
