"""A language model with the head of its wrapper, used as a decoder of transformers is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbl_export.models.layers import backbone
from nbl_export.models.text_decoder import TextDecoder
from tests.families import VOCAB, Calibrated


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "phi4-multimodal", "idefics3"])
def test_a_cache_embeddings_and_kept_logits(name: str, wrapper: Callable[[str], Calibrated]) -> None:
    """Decoding with the cache that it returns, and reading embeddings, gives the logits of one pass over the ids."""
    model: Any = wrapper(name).model
    assert isinstance(model, TextDecoder) and backbone(model) is model.model
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :9], use_cache=True)
        rest = model(input_ids=ids[:, 9:], use_cache=True, cache=first.cache).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        last = model(input_ids=ids, logits_to_keep=2).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(embedded, whole)
    torch.testing.assert_close(last, whole[:, -2:], rtol=0, atol=1e-5)
    assert model.get_output_embeddings().weight.shape[0] == VOCAB


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "llava-next", "phi4-multimodal"])
def test_a_decoder_of_the_same_kind_can_be_made_small(
    name: str, wrapper: Callable[[str], Calibrated]
) -> None:
    """What is too long for the model is crossed on a copy, which has no towers either."""
    model: Any = wrapper(name).model
    config = type(model.config).from_dict({**model.config.to_dict(), "intermediate_size": 32})
    copy = model.of_config(config).eval()
    assert type(copy).__name__ == type(model).__name__
    tied = {"head.lm_head.weight"} if name == "gemma3" else set()
    assert {n for n, _ in copy.named_parameters()} == {n for n, _ in model.named_parameters()} | tied
    with torch.inference_mode():
        logits = copy(input_ids=torch.zeros(1, 5, dtype=torch.long), logits_to_keep=2).logits
    assert logits.shape == (1, 2, VOCAB)
