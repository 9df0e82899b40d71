"""The race, its verdicts and its cells, on times that the test makes up."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.processes import Tell
from nbl_export.verify.speed import candidates as module
from nbl_export.verify.speed.candidates import NO_ROOM, Candidate, Memory, ordered, peak_bytes
from nbl_export.verify.speed.ceiling import ceiling, timed
from nbl_export.verify.speed.pair import bench_checks
from nbl_export.verify.speed.race import Harness, Rounds, median_interval, race, ratio, timing
from nbl_export.verify.speed.values import CellResult, GraphCost, Machine, Roofline, Speed

ROOFLINE = Roofline("cpu", "float32", 2, 1e9, 1e9)
COST = GraphCost(1000, 10, 4000, 40, 200, 800)
HALF = GraphCost(800, 5, 3200, 20, 200, 800)
EMPTY = Memory()
MACHINE = Machine("cpu", 2, roofline=ROOFLINE)
# Of which no figure is another's multiple.
UNEVEN = GraphCost(
    weight_macs=100,
    attention_macs_per_context=3,
    weight_bytes=400,
    kv_bytes_per_token=7,
    last_macs=60,
    last_bytes=240,
)


class Timed:
    """A candidate that says how long it takes."""

    def __init__(self, prefill: float, step: float, cache: int = 100) -> None:
        self.seconds, self.cache = {"prefill": prefill, "decode": step}, cache

    def prefill(self) -> None: ...

    def rewind(self) -> None: ...

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        return self.cache


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


pytestmark = pytest.mark.usefixtures("clock")


def numbered(*names: str) -> dict[str, Iterator[str]]:
    return {name: map(f"{name}{{}}".format, range(100)) for name in names}


def test_everyone_runs_once_a_round_and_the_first_is_thrown_away() -> None:
    order: list[str] = []
    told: list[int] = []

    def run(candidate: Iterator[str]) -> str:
        order.append(next(candidate))
        return order[-1]

    found = race(numbered("a", "b", "c"), run, Rounds(3, 9), told.append)
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3"]
    assert found == {name: [f"{name}{n}" for n in (1, 2, 3)] for name in "abc"}
    assert sum(told) == 4


@pytest.mark.parametrize(("enough_at", "rounds"), [(0, 3), (3, 3), (5, 6), (6, 6), (100, 8)])
def test_rounds_are_added_until_it_is_enough(enough_at: int, rounds: int) -> None:
    told: list[int] = []

    def enough(values: Mapping[str, list[str]]) -> bool:
        return len(values["a"]) >= enough_at

    found = race(numbered("a", "b"), next, Rounds(3, 8), told.append, enough)
    assert len(found["a"]) == len(found["b"]) == rounds
    assert sum(told) == 4


@pytest.mark.parametrize(("bound", "rounds"), [(1, 3), (100, 3), (1000, 6), (1e9, 7)])
def test_time_bounds_the_rounds_but_three_are_run(clock: list[float], bound: float, rounds: int) -> None:
    """180 s a round; the warm-up is not counted."""
    told: list[int] = []

    def run(candidate: Iterator[str]) -> str:
        clock[0] += 90.0
        return next(candidate)

    found = race(numbered("a", "b"), run, Rounds(7, 7, bound), told.append)
    assert len(found["a"]) == rounds
    assert sum(told) == 8


def test_who_fails_drops_out_with_the_reason() -> None:
    def run(candidate: Iterator[str]) -> str:
        value = next(candidate)
        if value == "b2":
            raise MemoryError("no room\nfor it")
        return value

    absent: dict[str, str] = {}
    found = race(numbered("a", "b"), run, Rounds(3, 3), lambda _: None, absent=absent)
    assert found == {"a": ["a1", "a2", "a3"]} and absent == {"b": "no room"}
    with pytest.raises(MemoryError):
        race(numbered("b"), run, Rounds(3, 3), lambda _: None)
    assert race({}, run, Rounds(3, 3), lambda _: None) == {}


def test_a_timing_by_hand(clock: list[float]) -> None:
    found = timing([0.004, 0.006, 0.008])
    assert (found.median_ms, found.low_ms, found.high_ms, found.p99_ms) == (6, 5, 7, None)
    # Of single passes, of which a round has several.
    assert timing([0.004], [0.001 * n for n in range(101)]).p99_ms == 99

    def work() -> None:
        clock[0] += 2.5

    assert timed(work) == 2.5


def test_a_ratio_by_hand() -> None:
    found = ratio([0.004, 0.006, 0.008] * 2, [0.002] * 6)
    assert (found.low, found.value, found.high) == pytest.approx((2.25, 3, 3.75))
    assert (found.least, found.most) == pytest.approx((2, 4)) and found.resolved
    slower = ratio([0.001] * 6, [0.002] * 6)
    assert slower.value == pytest.approx(0.5) and slower.resolved
    straddling = ratio([0.001, 0.002, 0.003] * 2, [0.002] * 6)
    assert straddling.value == pytest.approx(1) and not straddling.resolved


@pytest.mark.parametrize("rounds", range(1, 6))
def test_fewer_than_six_rounds_resolve_nothing(rounds: int) -> None:
    """However clear: of so few, the range itself does not hold the median with 95 %."""
    found = ratio([3.0] * rounds, [1.0] * rounds)
    assert found.value == 3 and not found.resolved
    assert (found.least, found.most) == (-math.inf, math.inf)
    assert ratio([3.0] * 6, [1.0] * 6).resolved


def noisy(rng: np.random.Generator, rounds: int) -> list[list[float]]:
    """Seconds of two equal candidates in turn: the machine's drift meets both, jitter and interruptions one of them."""
    machine = np.exp(np.cumsum(rng.normal(0, 0.005, rounds)) + rng.normal(0, 0.02, rounds))
    jitter = np.exp(rng.normal(0, 0.02, (2, rounds)))
    interruptions = 1 + (rng.random((2, rounds)) < 0.05) * rng.exponential(0.3, (2, rounds))
    return [[float(s) for s in one] for one in machine * jitter * interruptions]


def resolved(times: list[list[float]], rounds: int) -> bool:
    return ratio(times[0][:rounds], times[1][:rounds]).resolved


@pytest.mark.parametrize("rounds", [5, 6, 10, 21])
def test_equal_candidates_are_seldom_resolved(rounds: int) -> None:
    """Resolved is claimed with 95 %: of races in which nothing differs no more than a twentieth may be."""
    rng = np.random.default_rng(rounds)
    share = np.mean([resolved(noisy(rng, rounds), rounds) for _ in range(2000)])
    assert share <= (0.05 if rounds >= 6 else 0.0)


@pytest.mark.parametrize(
    ("least", "most", "looks"),
    [(5, 15, [6, 9, 14, 15]), (7, 21, [7, 11, 17, 21])],
)
def test_looking_again_as_rounds_are_added_claims_no_more(least: int, most: int, looks: list[int]) -> None:
    """Each look is another chance to be wrong; a race as it is run stays within what is claimed all the same."""
    seen: list[int] = []

    def enough(values: Mapping[str, list[str]]) -> bool:
        seen.append(len(values["a"]))
        return False

    race(numbered("a", "b"), next, Rounds(least, most), lambda _: None, enough)
    # After the last one nothing is added, whatever it says; three and five say nothing.
    assert [n for n in seen if n >= 6] == [n for n in looks if n < most]
    rng = np.random.default_rng(0)

    def quiet() -> list[list[float]]:
        """Jitter alone: then the base's own median is known well, and holds back the fewest claims."""
        return [[float(s) for s in np.exp(rng.normal(0, 0.02, most))] for _ in range(2)]

    for make in (lambda: noisy(rng, most), quiet):
        races = [make() for _ in range(1500)]
        assert np.mean([any(resolved(times, n) for n in looks) for times in races]) <= 0.05


@pytest.mark.parametrize(("count", "first"), [(6, 0), (8, 0), (9, 1), (12, 2), (21, 5), (30, 9)])
def test_the_interval_lies_between_order_statistics(count: int, first: int) -> None:
    """The ranks are those of any table of the sign test's intervals, 95 %."""
    values = np.random.default_rng(0).permutation(count).astype(float)
    assert median_interval(values.tolist()) == (first, count - 1 - first)


@pytest.mark.usefixtures("told")
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


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(("least", "most", "rounds"), [(3, 3, 3), (3, 9, 6), (5, 15, 6), (7, 21, 7)])
def test_rounds_are_added_until_there_can_be_a_verdict(least: int, most: int, rounds: int) -> None:
    """Fewer than six say nothing; where there may be no more, the cell says that it is not resolved."""
    speed = raced([(1, 8)], rounds=Rounds(least, most))
    assert speed.rounds == least and {r.rounds for c in speed.cells for r in c.results} == {rounds}
    assert [over.resolved for _, _, over in speed.speedups()] == [rounds >= 6] * 2
    assert bench_checks(speed)[1].status == ("passed" if rounds >= 6 else "skipped")


@pytest.mark.usefixtures("told")
def test_cells_ascend_and_the_last_position_decodes_nothing() -> None:
    cells = [(4, 8), (1, 32), (1, 8), (4, 16), (1, 8)]
    assert ordered(cells) == [(1, 8), (4, 8), (1, 32), (4, 16)]
    found = ran([(1, 16), (1, 8)], positions=16)
    assert [(c.phase, c.context) for c in found] == [("prefill", 8), ("decode", 8), ("prefill", 16)]


@pytest.mark.usefixtures("told")
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


@pytest.mark.usefixtures("told")
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
        "linearized": "does not fit into memory with the others: it needs 3.0 GiB",
        "other": "it finds no room",
    }
    assert [[r.name for r in cell.results] for cell in large][1] == ["base", "linearized"]
    assert large[1].results[0].peak_bytes == 3 * gib


# processes ---------------------------------------------------------------------------------------


def test_peaks_are_those_of_processes_of_their_own(stories_out: Path) -> None:
    cells = [(1, 8), (2, 400)]
    held = np.ones(1 << 27)  # 1 GiB
    found = peak_bytes(stories_out / "model.onnx", cells)
    del held
    small, large = (found[cell] for cell in cells)
    assert isinstance(small, int) and isinstance(large, int)
    # Not of this process, which a process that it starts begins as.
    assert (20 << 20) < small <= large < (1 << 30)
    # What does not run is no want of memory.
    found = peak_bytes(stories_out / "model.onnx", [(1, 8), (-1, 8), (1, 16)])
    assert list(map(type, found.values())) == [int, str, str] and "negative" in str(found[1, 16])
    with pytest.raises(InputError, match=r"no-such.onnx does not exist"):
        peak_bytes(stories_out / "no-such.onnx", cells)


def test_what_finds_no_room_says_so_and_so_does_what_is_larger(stories_out: Path) -> None:
    """A mask of a million tokens squared is more than a machine has; no process is killed for it."""
    found = peak_bytes(stories_out / "model.onnx", [(1, 8), (1, 1 << 20), (2, 1 << 20)])
    small, *larger = found.values()
    assert isinstance(small, int) and larger == [NO_ROOM, NO_ROOM]


def broken(asked: Any, tell: Tell) -> None:
    """In the place of the measuring function: the first cell, and then what the test asks for."""
    tell(1 << 20)
    if asked[0].endswith("raises.onnx"):
        raise TypeError("of the runtime")
    os.kill(os.getpid(), getattr(signal, Path(asked[0]).stem))


@pytest.mark.parametrize(
    ("end", "said"),
    [("SIGKILL", NO_ROOM), ("SIGABRT", NO_ROOM), ("SIGSEGV", "died by SIGSEGV")],
)
def test_what_was_measured_before_the_end_is_kept(
    monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    monkeypatch.setattr(module, "measure", broken)
    found = peak_bytes(Path(f"{end}.onnx"), [(1, 8), (1, 16), (2, 8)])
    assert found[1, 8] == 1 << 20
    assert all(str(found[cell]).startswith(said) for cell in ((1, 16), (2, 8)))


@pytest.mark.usefixtures("told")
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
