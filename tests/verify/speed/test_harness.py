"""The bench: who meets whom, what stands beside each figure, and which speedups are believed. No time is asserted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.checks import Check
from nbl_export.verify.speed import harness as module
from nbl_export.verify.speed import profile as profile_module
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.ceiling import ceiling
from nbl_export.verify.speed.checks import CONTROL, bench_checks
from nbl_export.verify.speed.harness import Harness
from nbl_export.verify.speed.memory import Memory, ordered
from nbl_export.verify.speed.profile import (
    GraphPair,
    NodeTimes,
    compared,
    explain,
    explained_cell,
    graph_pairs,
)
from nbl_export.verify.speed.race import Rounds
from nbl_export.verify.speed.values import CellResult, Explanation, GraphCost, Machine, Roofline, Speed

ROOFLINE = Roofline("cpu", "float32", 2, 1e9, 1e9)
COST = GraphCost(1000, 10, 4000, 40, 200, 800)
HALF = GraphCost(800, 5, 3200, 20, 200, 800)
EMPTY = Memory()
MACHINE = Machine("cpu", 2, roofline=ROOFLINE)
GOOD = Explanation(9, 8, {"Add": 1.0}, 3.0, 1.0, 3.0, False)


class Timed:
    """A candidate that says how long it takes."""

    def __init__(self, prefill: float, step: float, cache: int = 100) -> None:
        self.seconds, self.cache = {"prefill": prefill, "decode": step}, cache

    def prefill(self) -> None: ...

    def rewind(self) -> None: ...

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        return self.cache


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prefill_seconds", lambda prompt: (prompt.seconds["prefill"],))
    monkeypatch.setattr(module, "decode_seconds", lambda prompt, steps: (prompt.seconds["decode"],) * steps)
    monkeypatch.setattr("nbl_export.verify.speed.race._SETTLE", 0)


def lasting(*seconds: float) -> Callable[[int, int], Any]:
    return lambda context, batch: Timed(*seconds)


PAIR = [
    Candidate("base", lasting(2.0, 0.2), cost=COST),
    Candidate("linearized", lasting(1.6, 0.1), "base", cost=HALF),
    Candidate("other", lasting(4.0, 0.05)),
]


def raced(
    cells: list[tuple[int, int]],
    candidates: list[Candidate] = PAIR,
    memory: Memory = EMPTY,
    positions: int | None = None,
    rounds: Rounds = Rounds(6, 9),  # noqa: B008
) -> Speed:
    return Harness(candidates, MACHINE, rounds, memory=memory, positions=positions).measure(cells)


def ran(*arguments: Any, **more: Any) -> tuple[CellResult, ...]:
    return raced(*arguments, **more).cells


def verdicts(speed: Speed, **explanations: Explanation) -> list[Check]:
    """Of cells that are explained so."""
    cells = [
        replace(c, results=tuple(replace(r, explanation=explanations.get(r.name)) for r in c.results))
        for c in speed.cells
    ]
    return list(bench_checks(replace(speed, cells=tuple(cells))))


def test_every_figure_of_a_cell_by_hand() -> None:
    prefill, decode = ran([(2, 10)])
    assert (prefill.phase, prefill.batch, prefill.context) == ("prefill", 2, 10)
    assert decode.phase == "decode" and not prefill.absent
    base, linear, other = prefill.results
    assert [r.name for r in prefill.results] == ["base", "linearized", "other"]
    assert base.timing.median_ms == 2000 and base.rounds == 6 and base.cache_bytes == 100
    assert base.tokens_per_second == 20 / 2 and decode.results[0].tokens_per_second == 2 / 0.2
    assert base.over_base is base.ceiling is None and base.of_roofline
    assert linear.over_base and linear.over_base.value == 1.25 and linear.over_base.resolved
    assert linear.ceiling == ceiling(COST, HALF, ROOFLINE, "prefill", 10, 2)
    assert linear.of_roofline == pytest.approx(ROOFLINE.seconds(HALF.prefill(10, 2)) / 1.6)
    # How many times as fast the linearized graph is as each of the others.
    over = [r.linearized_over for r in prefill.results]
    assert [ratio and ratio.value for ratio in over] == [1.25, None, 2.5]
    assert decode.results[2].linearized_over and decode.results[2].linearized_over.value == 0.5
    assert base.timing.p99_ms is None
    assert other.over_base is other.ceiling is other.of_roofline is other.peak_bytes is None


@pytest.mark.parametrize(("least", "most", "rounds"), [(3, 3, 3), (3, 9, 6), (5, 15, 6), (7, 21, 7)])
def test_rounds_are_added_until_there_can_be_a_verdict(least: int, most: int, rounds: int) -> None:
    """Fewer than six say nothing; where there may be no more, the cell says that it is not resolved."""
    speed = raced([(1, 8)], rounds=Rounds(least, most))
    assert speed.rounds == least and {r.rounds for c in speed.cells for r in c.results} == {rounds}
    assert [over.resolved for _, _, over in speed.speedups()] == [rounds >= 6] * 2
    assert verdicts(speed)[1].status == ("passed" if rounds >= 6 else "skipped")


def test_single_passes_where_they_are_asked_for() -> None:
    """Both phases of each cell with the same candidates; what is not asked for is not there."""
    steps = iter(range(10**6))

    class Growing(Timed):
        @property
        def seconds(self) -> Any:
            return {"prefill": 1.0, "decode": float(next(steps))}

        @seconds.setter
        def seconds(self, _value: Any) -> None: ...

    one = [Candidate("one", lambda *_: Growing(1, 1))]
    found = Harness(one, MACHINE, Rounds(101, 101), ("decode",), percentile=True, steps=1).measure([(1, 8)])
    (result,) = found.cells[0].results
    # The warm-up, of 0 s, is not counted.
    assert (result.timing.median_ms, result.timing.p99_ms) == (51e3, 100e3)
    assert found.has_percentiles and not raced([(1, 8)]).has_percentiles


def test_a_strict_race_raises() -> None:
    def none(_context: int, _batch: int) -> Any:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        Harness([*PAIR, Candidate("none", none)], MACHINE, Rounds(3, 3), strict=True).measure([(1, 8)])


def test_without_a_roofline_there_are_no_ceilings() -> None:
    speed = Harness(PAIR, Machine("a GPU"), Rounds(6, 6)).measure([(1, 8)])
    assert all(r.ceiling is r.of_roofline is None for c in speed.cells for r in c.results)
    assert [over.value for _, _, over in speed.speedups()] == [1.25, 2.0]


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

    def prefills(*free: int) -> list[CellResult]:
        left = iter(free)
        found = ran([(1, 8), (1, 16)], memory=Memory(peaks, lambda: next(left)))
        return [cell for cell in found if cell.phase == "prefill"]

    # What the small cell took need not be there again.
    small, large = prefills(4 * gib, 4 * gib), prefills(40 * gib, 40 * gib)
    assert [[r.name for r in cell.results] for cell in small] == [["base", "linearized", "other"], ["base"]]
    assert small[1].absent == {
        "linearized": "no room beside the others: it needs 3.0 GiB",
        "other": "it finds no room",
    }
    assert [[r.name for r in cell.results] for cell in large][1] == ["base", "linearized"]
    assert large[1].results[0].peak_bytes == 3 * gib


def test_who_cannot_be_made_or_fails_is_left_out_with_the_reason() -> None:
    def none(_context: int, _batch: int) -> Any:
        raise RuntimeError("no such thing\nat all")

    class Failing(Timed):
        @property
        def seconds(self) -> Any:
            raise torch.OutOfMemoryError("no room")

        @seconds.setter
        def seconds(self, _value: Any) -> None: ...

    more = [Candidate("none", none), Candidate("failing", lambda *_: Failing(1, 1))]
    prefill, decode = ran([(1, 8)], [*PAIR, *more])
    for cell in (prefill, decode):
        assert cell.absent == {"none": "no such thing", "failing": "no room"}
        assert len(cell.results) == 3


def test_speedups_are_explained_by_what_their_interval_is_sure_of(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def reason(graphs: Any, phase: str, _made: Any, *figures: Any) -> Explanation | None:
        asked.append((graphs, phase, *figures))
        return GOOD if phase == "prefill" else None

    monkeypatch.setattr(profile_module, "explain", reason)
    passes = iter([0.5, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5])
    seconds = lambda p: (p.seconds["prefill"] or next(passes),)  # noqa: E731
    monkeypatch.setattr(module, "prefill_seconds", seconds)
    a, b = Path("a"), Path("b")
    race = [
        Candidate("base", lasting(1.0, 1.0), graph=a, cost=COST),
        Candidate("linearized", lasting(0.0, 0.9), "base", b, HALF),
        Candidate("engine", lasting(0.8, 0.9), "base", None, HALF),
        Candidate("elsewhere", lasting(1.0, 0.9), graph=b, cost=HALF),
    ]
    pairs = graph_pairs(race)
    assert pairs == {"linearized": GraphPair("base", (a, b))}
    run: Any = None

    def explained(cell: CellResult) -> dict[str, Explanation]:
        found = explained_cell(cell, pairs, run, "there")
        assert [replace(r, explanation=None) for r in found.results] == list(cell.results)
        return {r.name: r.explanation for r in found.results if r.explanation}

    prefill, decode = ran([(1, 8)], race)
    assert prefill.results[1].timing.median_ms == 500
    assert explained(prefill) == {"linearized": GOOD}
    assert explained(decode) == {}
    limits = [ceiling(COST, HALF, ROOFLINE, phase, 8) for phase in ("prefill", "decode")]
    assert asked == [
        ((a, b), "prefill", 1000, pytest.approx(1 / 0.6), limits[0], "there"),
        ((a, b), "decode", 1000, pytest.approx(1 / 0.9), limits[1], "there"),
    ]
    # Who was absent cannot be profiled.
    assert explained(replace(prefill, results=prefill.results[:1])) == {}
    assert explained(replace(prefill, results=prefill.results[1:])) == {}


def test_only_a_speedup_above_its_ceiling_is_explained() -> None:
    def made(_model: Any) -> Any:
        raise AssertionError

    # Graphs that do not exist are not profiled.
    for speedup in (1.1, 1.2, -math.inf):
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
    speed = raced([(1, 8)])
    assert [c.status for c in verdicts(speed)] == ["passed", "passed", "skipped"]
    assert [c.status for c in verdicts(speed, linearized=GOOD)] == ["passed", "passed", "skipped"]
    ceilings, slower, _ = verdicts(speed, linearized=bad)
    assert (ceilings.status, slower.status) == ("failed", "passed")
    assert (
        "prefill 8, linearized: 3.00 ms saved at least, 1.00 of them beyond the ceiling, but 1.00 in nodes"
        in ceilings.detail
    )
    slow = [PAIR[0], Candidate("linearized", lasting(2.5, 0.1), "base", cost=HALF)]
    slower = verdicts(raced([(1, 8)], slow))[1]
    assert slower.status == "failed" and slower.detail == "prefill 8, linearized: 0.80×"
    same = [PAIR[0], Candidate("linearized", lasting(2.0, 0.2), "base", cost=HALF)]
    assert verdicts(raced([(1, 8)], same))[1].status == "skipped"


@pytest.mark.parametrize(
    ("again", "status"), [(2.0, "passed"), (1.9, "passed"), (1.7, "failed"), (2.3, "failed")]
)
def test_the_same_graph_twice(again: float, status: str) -> None:
    # Linearized is 1.25 times as fast as the base: a quarter, of which half may be luck.
    speed = raced([(1, 8)], [*PAIR, Candidate(CONTROL, lasting(again, 0.2))])
    check = verdicts(speed)[2]
    assert check.name == "same graph twice" and check.status == status
    if status == "failed":
        said = f"prefill 8: linearized is 1.25× as fast as the base graph, {again / 1.6:.2f}× as fast as the same"
        assert check.detail.startswith(said)


def test_of_too_few_rounds_nothing_is_said_about_the_same_graph() -> None:
    control = [*PAIR, Candidate(CONTROL, lasting(1.7, 0.2))]
    assert verdicts(raced([(1, 8)], control, rounds=Rounds(5, 5)))[2].status == "skipped"


def test_the_linearized_graph_gets_its_memory_first() -> None:
    order: list[str] = []

    def noted(name: str) -> Any:
        return lambda *_: order.append(name) or Timed(1.0, 1.0)

    found = ran([(1, 8)], [Candidate(name, noted(name)) for name in ("base", "linearized", "other")])
    assert order == ["linearized", "base", "other"]
    assert [r.name for r in found[0].results] == ["base", "linearized", "other"]
