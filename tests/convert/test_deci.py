"""Which blocks a plan becomes, and which models they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.deci import DeciBlock, blocks_of, check_held, rope_base, rope_factors
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, Plan
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]


@pytest.mark.parametrize(
    ("chosen", "layer"),
    [
        ([], [DeciBlock(attention=1, mlp=1)]),
        ([1], [DeciBlock(linear=1), DeciBlock(mlp=1)]),
        ([Mlp(1)], [DeciBlock(attention=1), DeciBlock(linear=Mlp(1))]),
        ([1, Mlp(1)], [DeciBlock(linear=1), DeciBlock(linear=Mlp(1))]),
        ([Span(1, 1)], [DeciBlock(linear=1)]),
    ],
)
def test_a_layer_is_as_many_blocks_as_it_has_biases(
    chosen: Sequence[Block], layer: Sequence[DeciBlock], random_plan: RandomPlan
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = random_plan(model, chosen)
    first, last = DeciBlock(attention=0, mlp=0), DeciBlock(attention=2, mlp=2)
    assert blocks_of(plan) == (first, *layer, last)


def test_what_is_dropped_has_no_block_and_the_first_block_has_heads(random_plan: RandomPlan) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = random_plan(model, []).with_replaced({0: DROPPED, Mlp(1): DROPPED, 2: DROPPED, Mlp(2): DROPPED})
    blocks = blocks_of(plan)
    assert blocks == (DeciBlock(), DeciBlock(mlp=0), DeciBlock(attention=1))
    assert blocks[0].has_heads and not blocks[1].has_heads and blocks[2].has_heads
    # Of a span the first layer has the map, the others nothing.
    span = blocks_of(random_plan(model, [Span(0, 1)]))
    assert span == (DeciBlock(linear=0), DeciBlock(attention=2, mlp=2))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM (gemma2) is none: --to gguf takes llama, mistral, qwen2."),
        ("qwen3", {}, "is none: --to gguf takes"),
        ("llama", {"hidden_act": "gelu"}, "gates with SiLU, and LlamaForCausalLM (llama) with gelu."),
        ("mistral", {"sliding_window": 8}, "MistralForCausalLM (mistral) has a sliding window"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "Qwen2ForCausalLM (qwen2) has a sliding window",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of the kind 'dynamic'"),
    ],
)
def test_a_model_that_the_architecture_does_not_have(
    kind: str, changes: dict[str, Any], message: str, random_plan: RandomPlan
) -> None:
    model = tiny_model(kind, **changes)
    with pytest.raises(InputError) as refused:
        check_held(model, random_plan(model, [1]))
    assert message in str(refused.value)


def test_a_plan_that_reads_the_residual_stream(random_plan: RandomPlan) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="select again without --fit-input residual"):
        check_held(model, replace(random_plan(model, [1]), fit_input="residual"))


@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {})]
)
def test_models_like_llama_are_held(kind: str, changes: dict[str, Any], random_plan: RandomPlan) -> None:
    model = tiny_model(kind, **changes)
    check_held(model, random_plan(model, [1]))


def test_frequencies_are_divided_as_the_model_divides_them() -> None:
    assert rope_factors(tiny_model("llama")) is None
    asked = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model("llama", rope_scaling={**asked, "original_max_position_embeddings": 32})
    factors = rope_factors(model)
    assert factors is not None and factors.max() > 1.5
    head: int = model.config.hidden_size // model.config.num_attention_heads
    plain = rope_base(model) ** (-np.arange(0, head, 2) / head)
    torch.testing.assert_close(
        torch.from_numpy(plain).float() / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=1e-7
    )
