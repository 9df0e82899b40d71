"""What a graph costs, counted by hand from the model's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.rewrite.replace import rewrite_file
from nbl_export.verify.speed.ceiling import ceiling, graph_cost
from nbl_export.verify.speed.values import GraphCost, Roofline
from tests.fixtures_graph import plan_by_hand
from tests.verify.speed.raced import UNEVEN

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
        last_bytes=4 * vocab * d,
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


def test_a_ceiling_is_the_ratio_of_least_times() -> None:
    half = GraphCost(50, 0, 200, 0, 30, 120)
    slow_memory, slow_arithmetic = (
        Roofline("cpu", "float32", 2, *rates) for rates in ((1e9, 1.0), (1.0, 1e9))
    )
    assert ceiling(UNEVEN, half, slow_memory, "decode", 10) == (400 + 70) / 200
    assert ceiling(UNEVEN, half, slow_arithmetic, "prefill", 10) == (10 * 40 + 60 + 300) / (10 * 20 + 30)
    # Each piece is bound by what it needs most of: here weights by memory, the cache's products by arithmetic.
    both = Roofline("cpu", "float32", 2, macs_per_second=1.0, bytes_per_second=2.0)
    assert both.seconds(UNEVEN.decode(10)) == max(100, 200) + max(30, 35)
    assert both.seconds(UNEVEN.decode(10, 8)) == max(800, 200) + max(240, 280)
    assert ceiling(UNEVEN, half, both, "decode", 10, 8) == (800 + 280) / 400
