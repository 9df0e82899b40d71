"""What a graph costs, counted by hand from the model's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.graph.rewrite import rewrite_file
from nbl_export.verify.ceiling import GraphCost, graph_cost
from tests.fixtures_graph import plan_by_hand

# width, MLP width, vocabulary, query heads, KV heads, head size, layers
STORIES = (64, 172, 512, 8, 4, 8, 5)
TINY = (32, 64, 260, 4, 2, 8, 4)


def by_hand(sizes: tuple[int, ...], linear: int = 0) -> GraphCost:  # of graphs that can leave logits out
    d, mlp, vocab, heads, kv_heads, dim, layers = sizes
    attention = 2 * d * heads * dim + 2 * d * kv_heads * dim
    weights = (layers - linear) * attention + linear * d * d + layers * 3 * d * mlp + vocab * d
    return GraphCost(
        weight_macs=weights,
        # q kᵀ and p v: head size multiply-adds for each head and token of context.
        attention_macs_per_context=(layers - linear) * 2 * heads * dim,
        weight_bytes=4 * weights,
        kv_bytes_per_token=(layers - linear) * 2 * kv_heads * dim * 4,
        last_macs=vocab * d,
    )


def test_tiny_graph_by_hand(tiny_graph: Path) -> None:
    cost = graph_cost(tiny_graph)
    assert cost == by_hand(TINY)
    assert cost.weight_macs == 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 260 * 32 == 45_184
    assert cost.kv_bytes_per_token == 512


@pytest.mark.parametrize("layers", [(), (0,), (1, 2), (0, 1, 2, 3, 4)], ids=str)
def test_stories_graph_by_hand(stories_out: Path, tmp_path: Path, layers: tuple[int, ...]) -> None:
    baseline = stories_out / "baseline" / "model.onnx"
    assert graph_cost(baseline) == by_hand(STORIES)
    rewrite_file(baseline, plan_by_hand(stories_out, layers), tmp_path / "model.onnx")
    assert graph_cost(tmp_path / "model.onnx") == by_hand(STORIES, len(layers))


def test_prefill_grows_with_the_square_and_decode_with_the_context() -> None:
    cost = GraphCost(weight_macs=100, attention_macs_per_context=3, weight_bytes=400, kv_bytes_per_token=7)
    assert cost.prefill_macs(10) == 10 * 100 + 10 * 10 * 3
    assert cost.prefill_macs(0) == 0
    last = replace(cost, last_macs=60)
    assert last.prefill_macs(10) == 10 * 40 + 10 * 10 * 3 + 60
    assert last.decode_bytes(10) == cost.decode_bytes(10)
    assert cost.decode_bytes(10) == 400 + 70
    assert cost.decode_bytes(0) == 400
    assert cost.as_json() == {
        "weight_macs": 100,
        "attention_macs_per_context": 3,
        "weight_bytes": 400,
        "kv_bytes_per_token": 7,
        "last_macs": 0,
    }
