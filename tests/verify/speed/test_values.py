"""The values of a race: work by hand, what is read off cells, and the verdicts on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbl_export.records import Check
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.checks import CONTROL, bench_checks, speed_check
from nbl_export.verify.speed.race import Rounds
from nbl_export.verify.speed.values import (
    CandidateInfo,
    CellResult,
    Machine,
    Ratio,
    Result,
    Roofline,
    Speed,
    Timing,
    Work,
)
from tests.verify.speed.raced import HALF, PAIR, UNEVEN, lasting, raced


def test_the_work_of_a_pass_by_hand() -> None:
    assert UNEVEN.prefill(10, 2) == [
        Work(20 * 40, 160),
        Work(2 * 60, 240),  # the logits of the last position of each row
        Work(20 * 10 * 3, 20 * 7),
    ]
    assert UNEVEN.decode(10, 2) == [Work(2 * 100, 400), Work(2 * 10 * 3, 2 * 10 * 7)]
    assert UNEVEN.decode(0) == [Work(100, 400), Work(0, 0)]
    for phase, work in (("prefill", UNEVEN.prefill), ("encode", UNEVEN.prefill), ("decode", UNEVEN.decode)):
        assert UNEVEN.work(phase, 10, 2) == work(10, 2)
    every = replace(UNEVEN, last_macs=0, last_bytes=0)
    assert sum(w.macs for w in every.prefill(10)) == 10 * 100 + 10 * 10 * 3


def test_the_least_time_is_the_sum_over_pieces_of_what_bounds_each() -> None:
    machine = Roofline("cpu", "float32", 2, macs_per_second=4.0, bytes_per_second=10.0)
    # 8/4 against 10/10, then 4/4 against 30/10: the pieces follow each other.
    assert machine.seconds([Work(8, 10), Work(4, 30)]) == 2 + 3
    # As one piece they would overlap.
    assert machine.seconds([Work(12, 40)]) == 4 and machine.seconds([]) == 0


def result(name: str, over: Ratio | None = None, p99: float | None = None) -> Result:
    return Result(name, Timing(2.0, 1.0, 3.0, p99), 6, 4000.0, over_base=over)


OVER = Ratio(1.5, 1.4, 1.6, 1.2, 1.8, True)


INFOS = (
    CandidateInfo("base"),
    CandidateInfo("linearized", "base", UNEVEN),
    CandidateInfo("other", "elsewhere"),
)


CELLS = (
    CellResult("prefill", 1, 2048, (result("base"), result("linearized", OVER)), {"other": "no room"}),
    CellResult("decode", 1, 2048, (result("base"),), {"linearized": "failed", "other": "no room"}),
    CellResult("prefill", 4, 8, (result("linearized"), result("other", OVER))),
)


SPEED = Speed(Machine("cpu", 2), 6, INFOS, CELLS)


def test_only_who_was_timed_beside_its_base_has_a_speedup() -> None:
    """Of the second cell it was absent; in the third the ratio is of another candidate."""
    assert SPEED.speedups() == [(CELLS[0], CELLS[0].results[1], OVER)]
    other = replace(SPEED, linearized="other")
    assert other.speedups() == [(CELLS[2], CELLS[2].results[1], OVER)]
    assert (SPEED.base, other.base, replace(SPEED, linearized="base").base) == ("base", "elsewhere", None)


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


@pytest.mark.usefixtures("told")
def test_speedups_above_their_ceilings_are_counted() -> None:
    speed = raced([(1, 8)])

    def detail(ceiling: float) -> str:
        cells = [
            replace(c, results=tuple(replace(r, ceiling=ceiling if r.over_base else None) for r in c.results))
            for c in speed.cells
        ]
        return speed_check(replace(speed, cells=tuple(cells))).detail

    assert detail(1.1).startswith(
        "2 of 2 speedups above the ceiling, which counts multiplications and bytes alone; "
    )
    assert detail(9.0).startswith("no speedup is certainly above its ceiling; ")


@pytest.mark.usefixtures("told")
def test_a_speed_that_is_believed_is_not_called_faster() -> None:
    check = speed_check(raced([(1, 8)]))
    assert check.status == "passed" and check.detail.endswith("; 2 of 2 speedups are resolved")
    slow = [PAIR[0], Candidate("linearized", lasting(2.5, 0.1), "base", cost=HALF)]
    check = speed_check(raced([(1, 8)], slow))
    assert check.detail.endswith("; 2 of 2 speedups are resolved; slower: prefill 8 0.80×")
    few = speed_check(raced([(1, 8)], slow, rounds=Rounds(5, 5)))
    assert few.detail.endswith("; 0 of 2 speedups are resolved")
    alone = raced([(1, 8)], PAIR[:1])
    assert speed_check(alone) == Check("speed", "skipped", "nothing was timed beside its base")
