"""The values of a race: work by hand, what is read off cells, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nbl_export.blocks import Block, Mlp
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings.making import Workload
from nbl_export.verify.speed import ceiling as module
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.ceiling import (
    Savings,
    block_savings,
    ceiling,
    graph_cost,
    measure_roofline,
    stored_bytes,
)
from nbl_export.verify.speed.pair import bench_checks
from nbl_export.verify.speed.values import (
    CONTROL,
    GraphCost,
    Ratio,
    Result,
    Roofline,
    Timing,
)
from tests.end_to_end.test_matrix import CHOSEN
from tests.exporters import GRAPH
from tests.families import Calibrated
from tests.fixtures_graph import plan_by_hand
from tests.verify.speed.test_race import HALF, PAIR, UNEVEN, lasting, raced


def test_the_work_of_a_pass_by_hand() -> None:
    assert UNEVEN.prefill(10, 2) == [
        (20 * 40, 160),
        (2 * 60, 240),  # the logits of the last position of each row
        (20 * 10 * 3, 20 * 7),
    ]
    assert UNEVEN.decode(10, 2) == [(2 * 100, 400), (2 * 10 * 3, 2 * 10 * 7)]
    assert UNEVEN.decode(0) == [(100, 400), (0, 0)]
    for phase, work in (("prefill", UNEVEN.prefill), ("encode", UNEVEN.prefill), ("decode", UNEVEN.decode)):
        assert UNEVEN.work(phase, 10, 2) == work(10, 2)
    every = replace(UNEVEN, last_macs=0, last_bytes=0)
    assert sum(macs for macs, _ in every.prefill(10)) == 10 * 100 + 10 * 10 * 3


def test_the_least_time_is_the_sum_over_pieces_of_what_bounds_each() -> None:
    machine = Roofline("cpu", "float32", 2, macs_per_second=4.0, bytes_per_second=10.0)
    # 8/4 against 10/10, then 4/4 against 30/10: the pieces follow each other.
    assert machine.seconds([(8, 10), (4, 30)]) == 2 + 3
    # As one piece they would overlap.
    assert machine.seconds([(12, 40)]) == 4 and machine.seconds([]) == 0


def result(name: str, over: Ratio | None = None, p99: float | None = None) -> Result:
    return Result(name, Timing(2.0, 1.0, 3.0, p99), 6, 4000.0, over_base=over)


OVER = Ratio(1.5, 1.4, 1.6, 1.2, 1.8, True)


def test_a_speedup_is_above_its_ceiling_for_certain_or_perhaps_or_not() -> None:
    one = replace(result("linearized", OVER), ceiling=1.1)
    assert one.above_ceiling is True
    assert replace(one, ceiling=1.3).above_ceiling is None  # the interval begins at 1.2
    for other in (replace(one, ceiling=1.5), replace(one, ceiling=None), replace(one, over_base=None)):
        assert other.above_ceiling is False


@pytest.mark.usefixtures("told")
def test_bench_checks() -> None:
    assert [c.status for c in bench_checks(raced([(1, 8)]))] == ["passed", "passed", "skipped"]
    slow = [PAIR[0], Candidate("linearized", lasting(2.5, 0.1), "base", cost=HALF)]
    slower = bench_checks(raced([(1, 8)], slow))[1]
    assert slower.status == "failed" and slower.detail == "prefill 8, linearized: 0.80×"
    same = [PAIR[0], Candidate("linearized", lasting(2.0, 0.2), "base", cost=HALF)]
    assert bench_checks(raced([(1, 8)], same))[1].status == "skipped"


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    ("again", "status"), [(2.0, "passed"), (1.9, "passed"), (1.7, "failed"), (2.3, "failed")]
)
def test_the_same_graph_twice(again: float, status: str) -> None:
    # Linearized is 1.25 times as fast as the base: a quarter, of which half may be luck.
    speed = raced([(1, 8)], [*PAIR, Candidate(CONTROL, lasting(again, 0.2))])
    check = bench_checks(speed)[2]
    assert check.name == "same graph twice" and check.status == status
    if status == "failed":
        said = f"prefill 8: linearized is 1.25× as fast as the base graph, {again / 1.6:.2f}× as fast as the same"
        assert check.detail.startswith(said)


# width, MLP width, vocabulary, query heads, KV heads, head size, layers
STORIES = (64, 172, 512, 8, 4, 8, 5)


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


def test_the_machine_is_measured() -> None:
    found = measure_roofline()
    assert (found.device, found.dtype) == ("cpu", "float32") and found.threads
    # A wrist watch and a supercomputer: what lies outside was counted in other units.
    assert 1e8 < found.macs_per_second < 1e14 and 1e8 < found.bytes_per_second < 1e14


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that take no time."""
    monkeypatch.setattr(module, "_STREAM", 1000)
    monkeypatch.setattr(module, "_PRODUCT", 8)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "best",
    [(2.0, 1.0, 4.0, 5.0), (6.0, 1.0, 4.0, 5.0), (2.0, 1.0, 9.0, 5.0)],
    ids=["triad and PyTorch", "sum", "onnxruntime"],
)
def test_the_best_repetition_of_the_fastest_counts(
    monkeypatch: pytest.MonkeyPatch, best: tuple[float, ...]
) -> None:
    """A triad moves three arrays of 1000 float32, a sum one; a product of 8 × 8 is 8³ multiply-adds."""
    triad, read, torch_product, ort_product = best
    seconds = iter([one * factor for one in best for factor in (3, 2, 2, 1, 2, 2, 2)])

    def told(work: Callable[[], object]) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr(module, "timed", told)
    found = measure_roofline()
    assert next(seconds, None) is None
    assert found.bytes_per_second == max(12000 / triad, 4000 / read)
    assert found.macs_per_second == 512 / min(torch_product, ort_product)
    assert found.threads == torch.get_num_threads()


# A machine that multiplies 10 times as often a second as it reads a byte.
ROOFLINE = Roofline("cpu", "float32", 1, 1e10, 1e9)


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


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_what_blocks_and_spans_save_is_what_is_gone_from_the_graph(
    calibrated_of: Callable[[str], Calibrated], tmp_path: Path, family: str
) -> None:
    """Experts, and MLPs with biases beside the attention."""
    path, case = tmp_path / "base.onnx", calibrated_of(family)
    save_graph(trace(case.model, FORMS["concat"]), path)
    for kind in ("half", "spans"):
        blocks, graph = CHOSEN[kind], load_graph(path)
        plan = case.plan(blocks)
        saved, without = block_savings(graph, plan), block_savings(graph, plan, 0)
        assert all(saved[block] != GraphCost(0, 0, 0, 0) for block in plan.chosen)
        work, stored = [Workload(decode=1, context=9)], stored_bytes(graph)
        rewrite_file(path, plan, tmp_path / kind / GRAPH)
        found = graph_cost(tmp_path / kind / GRAPH)
        of = Savings(graph_cost(path), saved, ROOFLINE, work, stored, without=without)
        assert of.left(blocks) == found and of.kv_bytes(blocks) == 10 * found.kv_bytes_per_token
