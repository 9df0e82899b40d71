"""A small copy has every kind of block, and what begins at a length begins early in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.errors import InputError
from nbl_export.models.layers import attention_layers, block_stack, layer_count
from nbl_export.models.lengths import Length, lengths
from nbl_export.models.small_copy import small_copy, small_lengths
from tests.beyond import BEYOND
from tests.fixtures_graph import load
from tests.multimodal import build


def large(name: str, **changes: Any) -> Any:
    """As it is downloaded: of a size that no test makes, without bytes."""
    with torch.device("meta"):
        return BEYOND[name].model(
            hidden_size=4096, intermediate_size=14336, vocab_size=128000, max_position_embeddings=131072,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, **changes,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["mistral", "gemma3", "cohere2", "llama4"])
def test_a_copy_is_small_and_its_length_acts(name: str) -> None:
    types = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    changes = {
        "num_hidden_layers": 6,
        **(types if name in ("gemma3", "cohere2") else {}),
        **({"no_rope_layers": [1, 1, 1, 0, 1, 1]} if name == "llama4" else {}),
    }
    model = large(name, **changes)
    copy = small_copy(model, lengths(model))
    assert type(copy) is type(model) and sum(p.numel() for p in copy.parameters()) < 1 << 27
    assert layer_count(copy) == 2
    assert {layer.kind for layer in attention_layers(copy)} == {
        layer.kind for layer in attention_layers(model)
    }
    assert [one.tokens for one in lengths(copy)] == [16]
    # The first 16 tokens cannot tell, and the others can: the same weights without it.
    off = small_copy(model, [])
    off.load_state_dict(copy.state_dict())
    ids = torch.randint(3, 250, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        here, there = (m(input_ids=ids).logits[0] for m in (copy, off))
    away = (here - there).abs().amax(-1) / here.std()
    assert float(away[:15].max()) < 1e-4 and float(away[18:].median()) > 0.03


def test_weights_are_drawn_by_the_seed_and_others_stay_as_they_were() -> None:
    model = BEYOND["mistral"].model()
    before = torch.random.get_rng_state()
    one, other, third = (small_copy(model, lengths(model), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [m.model.layers[1].self_attn.q_proj.weight for m in (one, other, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert lengths(model)[0].tokens == 100


def test_each_length_begins_by_itself_and_in_order() -> None:
    found = [Length("a", tokens, ()) for tokens in (4096, 512, 512, 8192, 12)]
    assert small_lengths(found) == {12: 12, 512: 22, 4096: 28, 8192: 34}


def test_what_cannot_be_made_small_says_so() -> None:
    model = large("mistral")
    model.config.intermediate_size = -1  # which its code does not build
    with pytest.raises(InputError, match=r"^MistralForCausalLM cannot be made smaller \(.+\)\.$"):
        small_copy(model, lengths(model))


@pytest.mark.parametrize("name", ["gemma3", "llama4", "gemma4"])
def test_the_language_model_of_a_multimodal_one_has_a_copy_of_its_blocks(name: str, tmp_path: Path) -> None:
    model = load(build(name, tmp_path / name))
    found = [Length(one.key, one.tokens, one.layers) for one in lengths(model)]
    copy = small_copy(model, found)
    blocks = [block_stack(m)[1][0] for m in (model, copy)]
    assert type(blocks[0]) is type(blocks[1])
    assert [one.key for one in lengths(copy)] == [one.key for one in found] != []


def test_a_list_of_blocks_has_them_by_their_new_places() -> None:
    fields = {"attn_layer_indices": [2, 5], "mamba_chunk_size": 256, "mamba_d_ssm": 32, "mamba_n_heads": 4}
    sizes = {"mamba_d_head": 32, "mamba_d_state": 8, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = AutoConfig.for_model("bamba", hidden_size=64, num_key_value_heads=2, **sizes, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    copy: Any = small_copy(model, lengths(model))
    assert [layer.index for layer in attention_layers(copy)] == [1] and layer_count(copy) == 2
    assert [one.name for one in lengths(copy)] == ["mamba_chunk_size 16"]
