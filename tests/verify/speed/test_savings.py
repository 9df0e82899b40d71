"""What blocks save, against graphs in which they are linear, and what that is in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings.workload import Workload
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.savings import Savings, block_savings, less, stored_bytes
from nbl_export.verify.speed.values import GraphCost, Roofline
from tests.end_to_end.matrix import CHOSEN
from tests.exporters import GRAPH
from tests.families import Calibrated

# A machine that multiplies 10 times as often a second as it reads a byte.
ROOFLINE = Roofline("cpu", "float32", 1, 1e10, 1e9)


@pytest.fixture(scope="module")
def source(
    calibrated_of: Callable[[str], Calibrated], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("savings")
    made: dict[str, Path] = {}

    def graph(family: str) -> Path:
        if family not in made:
            made[family] = root / f"{family}.onnx"
            save_graph(trace(calibrated_of(family).model, FORMS["concat"]), made[family])
        return made[family]

    return graph


def assert_counted(path: Path, case: Calibrated, folder: Path) -> None:
    """The graph's cost without what the blocks save is that of the graph in which they are linear."""
    plan = case.plan(CHOSEN["half"])
    saved = block_savings(load_graph(path), plan)
    rewrite_file(path, plan, folder / "out" / GRAPH)
    left = graph_cost(path)
    for block in plan.chosen:
        assert saved[block] != GraphCost(0, 0, 0, 0)
        left = less(left, saved[block])
    assert left == graph_cost(folder / "out" / GRAPH)


def test_savings_are_those_of_the_rewritten_graph(
    source: Callable[[str], Path], calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    assert_counted(source("mixtral"), calibrated_of("mixtral"), tmp_path)


# An attention has few weights and a cache, an MLP many weights.
ATTENTION, MLP = GraphCost(100, 20, 400, 8), GraphCost(800, 0, 3200, 0)
BLOCKS: dict[Block, GraphCost] = {0: ATTENTION, 1: ATTENTION, Mlp(0): MLP, Mlp(1): MLP}
GRAPH_COST = GraphCost(3000, 60, 12000, 24, 200, 800)


def savings(*workloads: Workload) -> Savings:
    return Savings(GRAPH_COST, BLOCKS, ROOFLINE, workloads, 20_000)


def test_milliseconds_by_hand() -> None:
    assert savings(Workload(prefill=10)).ms() == pytest.approx(
        1e3 * (max(10 * 2800 / 1e10, 11200 / 1e9) + max(200 / 1e10, 800 / 1e9) + max(6000 / 1e10, 240 / 1e9))
    )
    # 4 tokens after 100, which are 102 in the middle.
    decode = savings(Workload(decode=4, context=100, batch=2))
    token = max(6000 / 1e10, 12000 / 1e9) + max(2 * 102 * 60 / 1e10, 2 * 102 * 24 / 1e9)
    assert decode.ms() == pytest.approx(1e3 * 4 * token)
    assert savings(
        Workload(prefill=10), Workload(decode=4, context=100, batch=2, weight=3)
    ).ms() == pytest.approx(savings(Workload(prefill=10)).ms() + 3 * decode.ms())


def test_the_workload_says_which_block_saves_more() -> None:
    short, long = savings(Workload(decode=1, context=10)), savings(Workload(decode=1, context=10_000))
    assert short.saved_ms(Mlp(0)) > short.saved_ms(0)
    assert long.saved_ms(0) > long.saved_ms(Mlp(0))
    together = short.saved_ms(0) + short.saved_ms(Mlp(1), [0])
    assert short.ms() - short.ms([0, Mlp(1)]) == pytest.approx(together)
    assert short.speedup([0, Mlp(1)]) == pytest.approx(short.ms() / (short.ms() - together))
    assert short.speedup([]) == 1.0


def test_a_span_saves_what_its_map_leaves_of_all_its_parts() -> None:
    w = GraphCost(-10, 0, -40, 0)
    without = {block: less(cost, w) for block, cost in BLOCKS.items()}
    of = replace(savings(Workload(decode=1, context=10)), without=without)
    w_bytes, parts = 40, [0, Mlp(0), 1, Mlp(1)]
    # One W is left where there would be four.
    assert of.weight_bytes([Span(0, 1)]) == of.weight_bytes(parts) - 3 * w_bytes
    assert of.kv_bytes([Span(0, 1)]) == of.kv_bytes([0, 1])
    assert of.saved_ms(Span(0, 1)) == pytest.approx(sum(map(of.saved_ms, parts)) + 3 * 1e3 * w_bytes / 1e9)


@pytest.mark.parametrize("family", ("mixtral", "gpt_neox"))
def test_what_spans_save_is_what_is_gone_from_the_graph(
    source: Callable[[str], Path], calibrated_of: Callable[[str], Calibrated], tmp_path: Path, family: str
) -> None:
    path, blocks = source(family), CHOSEN["spans"]
    plan = calibrated_of(family).plan(blocks)
    assert plan.blocks == tuple(sorted(blocks))
    graph = load_graph(path)
    saved, without = block_savings(graph, plan), block_savings(graph, plan, 0)
    rewrite_file(path, plan, tmp_path / GRAPH)
    of = Savings(
        graph_cost(path),
        saved,
        ROOFLINE,
        [Workload(decode=1, context=9)],
        stored_bytes(graph),
        without=without,
    )
    assert of.left(blocks) == graph_cost(tmp_path / GRAPH)
    assert of.kv_bytes(blocks) == 10 * graph_cost(tmp_path / GRAPH).kv_bytes_per_token
