"""What one tiny forward pass says of a model, and which are refused by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from nbl_export.errors import InputError
from nbl_export.models.trial import check_served
from tests.models.architectures import FAMILIES, D, build


def test_an_attention_that_is_not_run_is_refused() -> None:
    model = build("Llama", "ForCausalLM", **FAMILIES["llama"].fields)
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(InputError, match="does not run the attention of layer 1 as it stands"):
        check_served(model)


def test_a_model_that_looks_ahead_is_refused() -> None:
    # A BERT saved as a language model without is_decoder has the name of one, but sees what comes later.
    config = BertConfig(
        vocab_size=64, hidden_size=D, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    with pytest.raises(InputError, match="is not causal"):
        check_served(model)


def test_a_causal_model_is_served(tiny_folder: Path) -> None:
    check_served(LlamaForCausalLM.from_pretrained(tiny_folder).eval())
