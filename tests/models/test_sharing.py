"""Which layer's keys and values a layer attends to, seen in a forward pass."""

from __future__ import annotations

import pytest
import torch

from nbl_export.models.layers import attention_layers
from nbl_export.models.sharing import shared_keys
from tests.tiny_types import tiny_model

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


def test_a_model_with_attention_of_its_own_shows_nothing() -> None:
    model = tiny_model("gpt_neo")
    assert shared_keys(model, attention_layers(model), lambda: pytest.fail("is run")) == {}
