"""The bench: who meets whom, what stands beside each figure, and which speedups are believed. No time is asserted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.checks import Check
from nbl_export.report.bench import CONTROL, bench_checks
from nbl_export.verify.speed import bench as module
from nbl_export.verify.speed.bench import (
    Bench,
    BenchCell,
    Competitor,
    Memory,
    Pair,
    explained,
    ordered,
    pairs_of,
)
from nbl_export.verify.speed.ceiling import GraphCost, ceiling
from nbl_export.verify.speed.profile import Explanation, NodeTimes, compared, explain
from nbl_export.verify.speed.race import Rounds
from nbl_export.verify.speed.roofline import Roofline

ROOFLINE = Roofline("cpu", "float32", 2, 1e9, 1e9)
COST = GraphCost(1000, 10, 4000, 40, 200, 800)
HALF = GraphCost(800, 5, 3200, 20, 200, 800)
EMPTY = Memory()
GOOD = Explanation(9, 8, {"Add": 1.0}, 3.0, 1.0, 3.0, False)


class Timed:
    """A contender that says how long it takes."""

    def __init__(self, prefill: float, step: float, cache: int = 100) -> None:
        self.seconds, self.cache = {"prefill": prefill, "decode": step}, cache

    def prefill(self) -> None: ...

    def rewind(self) -> None: ...

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        return self.cache


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = {name: lambda c, name=name: c.seconds[name] for name in ("prefill", "decode")}
    monkeypatch.setattr(module, "PHASES", phases)
    monkeypatch.setattr("nbl_export.verify.speed.race._SETTLE", 0)


def entrant(*seconds: float) -> Callable[[int, int], Any]:
    return lambda context, batch: Timed(*seconds)


PAIR = [
    Competitor("base", entrant(2.0, 0.2), cost=COST),
    Competitor("linearized", entrant(1.6, 0.1), "base", cost=HALF),
    Competitor("other", entrant(4.0, 0.05)),
]


def ran(
    cells: list[tuple[int, int]],
    competitors: list[Competitor] = PAIR,
    memory: Memory = EMPTY,
    positions: int | None = None,
) -> list[BenchCell]:
    bench = Bench(competitors, "linearized", Rounds(3, 9), ROOFLINE, memory, positions)
    return [cell for both in bench.run(cells) for cell in both]


def verdicts(cells: list[BenchCell], **explanations: Explanation) -> list[Check]:
    """Of cells that are explained so."""
    told = {name: asdict(reason) for name, reason in explanations.items()}
    return bench_checks([{**cell.as_json(), "explanations": told} for cell in cells])


def test_every_figure_of_a_cell_by_hand() -> None:
    prefill, decode = ran([(2, 10)])
    assert (prefill.phase, prefill.batch, prefill.context) == ("prefill", 2, 10)
    assert decode.phase == "decode" and not prefill.absent
    base, linear, other = prefill.laps
    assert [lap.name for lap in prefill.laps] == ["base", "linearized", "other"]
    assert base.timing.median_ms == 2000 and base.rounds == 3 and base.cache_bytes == 100
    assert base.tokens_per_second == 20 / 2 and decode.laps[0].tokens_per_second == 2 / 0.2
    assert base.over_base is base.ceiling is None and base.of_roofline
    assert linear.over_base and linear.over_base.value == 1.25 and linear.over_base.resolved
    assert linear.ceiling == ceiling(COST, HALF, ROOFLINE, "prefill", 10, 2)
    assert linear.of_roofline == pytest.approx(ROOFLINE.seconds(HALF.prefill(10, 2)) / 1.6)
    # How many times as fast the linearized graph is as each of the others.
    assert [lap.beaten and lap.beaten.value for lap in prefill.laps] == [1.25, None, 2.5]
    assert decode.laps[2].beaten and decode.laps[2].beaten.value == 0.5
    assert other.over_base is other.ceiling is other.of_roofline is other.peak_bytes is None


def test_cells_ascend_and_the_last_position_decodes_nothing() -> None:
    cells = [(4, 8), (1, 32), (1, 8), (4, 16), (1, 8)]
    assert ordered(cells) == [(1, 8), (4, 8), (1, 32), (4, 16)]
    found = ran([(1, 16), (1, 8)], positions=16)
    assert [(c.phase, c.context) for c in found] == [("prefill", 8), ("decode", 8), ("prefill", 16)]


def test_who_does_not_fit_beside_the_others_is_left_out() -> None:
    gib = 1 << 30
    peaks = {
        "base": {(1, 8): gib, (1, 16): 3 * gib},
        "linearized": {(1, 8): gib, (1, 16): 3 * gib},
        "other": {(1, 8): gib, (1, 16): "it finds no room"},
    }

    def prefills(*free: int) -> list[BenchCell]:
        left = iter(free)
        found = ran([(1, 8), (1, 16)], memory=Memory(peaks, lambda: next(left)))
        return [cell for cell in found if cell.phase == "prefill"]

    # What the small cell took need not be there again.
    small, large = prefills(4 * gib, 4 * gib), prefills(40 * gib, 40 * gib)
    assert [[lap.name for lap in cell.laps] for cell in small] == [["base", "linearized", "other"], ["base"]]
    assert small[1].absent == {
        "linearized": "no room beside the others: it needs 3.0 GiB",
        "other": "it finds no room",
    }
    assert [[lap.name for lap in cell.laps] for cell in large][1] == ["base", "linearized"]
    assert large[1].laps[0].peak_bytes == 3 * gib


def test_who_cannot_be_made_or_fails_is_left_out_with_the_reason() -> None:
    def none(_context: int, _batch: int) -> Any:
        raise RuntimeError("no such thing\nat all")

    class Failing(Timed):
        @property
        def seconds(self) -> Any:
            raise torch.OutOfMemoryError("no room")

        @seconds.setter
        def seconds(self, _value: Any) -> None: ...

    more = [Competitor("none", none), Competitor("failing", lambda *_: Failing(1, 1))]
    prefill, decode = ran([(1, 8)], [*PAIR, *more])
    for cell in (prefill, decode):
        assert cell.absent == {"none": "no such thing", "failing": "no room"}
        assert len(cell.laps) == 3


def test_speedups_are_explained_by_what_their_interval_is_sure_of(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def reason(graphs: Any, phase: str, _made: Any, *figures: Any) -> Explanation | None:
        asked.append((graphs, phase, *figures))
        return GOOD if phase == "prefill" else None

    monkeypatch.setattr(module, "explain", reason)
    passes = iter([0.5, 0.5, 0.6, 0.5])
    phases = {
        "prefill": lambda c: c.seconds["prefill"] or next(passes),
        "decode": lambda c: c.seconds["decode"],
    }
    monkeypatch.setattr(module, "PHASES", phases)
    a, b = Path("a"), Path("b")
    race = [
        Competitor("base", entrant(1.0, 1.0), graph=a, cost=COST),
        Competitor("linearized", entrant(0.0, 0.9), "base", b, HALF),
        Competitor("engine", entrant(0.8, 0.9), "base", None, HALF),
        Competitor("elsewhere", entrant(1.0, 0.9), graph=b, cost=HALF),
    ]
    assert pairs_of(race) == {"linearized": Pair("base", (a, b))}
    prefill, decode = (cell.as_json() for cell in ran([(1, 8)], race))
    assert prefill["laps"][1]["timing"]["median_ms"] == 500
    assert explained(prefill, pairs_of(race), "there") == {"linearized": asdict(GOOD)}
    assert explained(decode, pairs_of(race), "there") == {}
    limits = [ceiling(COST, HALF, ROOFLINE, phase, 8) for phase in ("prefill", "decode")]
    assert asked == [
        ((a, b), "prefill", 1000, pytest.approx(1 / 0.6), limits[0], "there"),
        ((a, b), "decode", 1000, pytest.approx(1 / 0.9), limits[1], "there"),
    ]
    # Who was absent cannot be looked into.
    prefill["laps"] = prefill["laps"][:1]
    assert explained(prefill, pairs_of(race)) == {}


def test_only_a_speedup_above_its_ceiling_is_explained() -> None:
    def made(_model: Any) -> Any:
        raise AssertionError

    # Graphs that do not exist are not profiled.
    for speedup in (1.1, 1.2):
        assert explain((Path("a"), Path("b")), "prefill", made, 1.0, speedup, 1.2) is None


def test_an_explanation_by_hand() -> None:
    a = NodeTimes(
        {"x": 5.0, "y": 3.0, "gone": 4.0, "gone too": 1.0},
        {"x": "MatMul", "y": "Add", "gone": "Softmax", "gone too": "Add"},
    )
    b = NodeTimes({"x": 5.0, "y": 3.0, "new": 2.0}, {"x": "MatMul", "y": "Add", "new": "MatMul"})
    found = compared(a, b, 13.0, 3.0, 1.0)
    assert (found.base_nodes, found.linearized_nodes, found.gone_ms) == (4, 3, 3.0)
    assert found.by_operator_ms == {"Softmax": 4.0, "Add": 1.0} and not found.suspect
    # In a race that took twice as long as the profile.
    assert compared(a, b, 26.0, 6.0, 2.0).gone_ms == 6.0
    # The same three milliseconds, saved in a node that both graphs have.
    slow = NodeTimes({**a.ms, "x": 8.0, "gone": 1.0}, a.ops)
    assert compared(slow, b, 13.0, 3.0, 1.0).suspect
    # And where the profiler does not see them at all.
    assert compared(a, b, 13.0, 12.0, 10.0).suspect


def test_verdicts() -> None:
    bad = replace(GOOD, gone_ms=1.0, suspect=True)
    cells = ran([(1, 8)])
    assert [c.status for c in verdicts(cells)] == ["passed", "passed", "skipped"]
    assert [c.status for c in verdicts(cells, linearized=GOOD)] == ["passed", "passed", "skipped"]
    ceilings, slower, _ = verdicts(cells, linearized=bad)
    assert (ceilings.status, slower.status) == ("failed", "passed")
    assert (
        "prefill 8, linearized: 3.00 ms saved at least, 1.00 of them beyond the ceiling, but 1.00 in nodes"
        in ceilings.detail
    )
    slow = [PAIR[0], Competitor("linearized", entrant(2.5, 0.1), "base", cost=HALF)]
    slower = verdicts(ran([(1, 8)], slow))[1]
    assert slower.status == "failed" and slower.detail == "prefill 8, linearized: 0.80×"
    same = [PAIR[0], Competitor("linearized", entrant(2.0, 0.2), "base", cost=HALF)]
    assert verdicts(ran([(1, 8)], same))[1].status == "skipped"


@pytest.mark.parametrize(
    ("again", "status"), [(2.0, "passed"), (1.9, "passed"), (1.7, "failed"), (2.3, "failed")]
)
def test_the_same_graph_twice(again: float, status: str) -> None:
    # Linearized is 1.25 times as fast as the base: a quarter, of which half may be luck.
    cells = ran([(1, 8)], [*PAIR, Competitor(CONTROL, entrant(again, 0.2))])
    check = verdicts(cells)[2]
    assert check.name == "same graph twice" and check.status == status
    if status == "failed":
        said = f"prefill 8: linearized is 1.25× as fast as the base graph, {again / 1.6:.2f}× as fast as the same"
        assert check.detail.startswith(said)


def test_the_linearized_graph_gets_its_memory_first() -> None:
    order: list[str] = []

    def noted(name: str) -> Any:
        return lambda *_: order.append(name) or Timed(1.0, 1.0)

    found = ran([(1, 8)], [Competitor(name, noted(name)) for name in ("base", "linearized", "other")])
    assert order == ["linearized", "base", "other"]
    assert [lap.name for lap in found[0].laps] == ["base", "linearized", "other"]
