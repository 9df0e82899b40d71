"""Which blocks a plan becomes, and which models they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.deci import DeciBlock, blocks_of
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
