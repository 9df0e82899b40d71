"""Verdicts: which speedups are believed, what is slower, and whether the same graph is as fast twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbl_export.checks import Check
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.checks import CONTROL, bench_checks, speed_check
from nbl_export.verify.speed.race import Rounds
from tests.verify.speed.raced import HALF, PAIR, lasting, raced


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
def test_of_too_few_rounds_nothing_is_said_about_the_same_graph() -> None:
    control = [*PAIR, Candidate(CONTROL, lasting(1.7, 0.2))]
    assert bench_checks(raced([(1, 8)], control, rounds=Rounds(5, 5)))[2].status == "skipped"


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
def test_what_may_be_chance_is_not_called_slower() -> None:
    """A fifth slower in every round, of too few to say so."""
    slow = [PAIR[0], Candidate("linearized", lasting(2.5, 0.25), "base", cost=HALF)]
    assert bench_checks(raced([(1, 8)], slow, rounds=Rounds(5, 5)))[1].status == "skipped"
    assert bench_checks(raced([(1, 8)], slow, rounds=Rounds(6, 6)))[1].status == "failed"


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
