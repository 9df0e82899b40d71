"""Verdicts: which speedups are believed, what is slower, and whether the same graph is as fast twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbl_export.checks import Check
from nbl_export.report.page import numeric_columns
from nbl_export.report.speed import VERIFIED, speed_tables
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.checks import CONTROL, speed_check
from nbl_export.verify.speed.pair import Pair, measure_speed
from nbl_export.verify.speed.race import Rounds
from nbl_export.verify.speed.values import Explanation, Speed
from tests.verify.speed.raced import GOOD, HALF, PAIR, lasting, raced, verdicts


@pytest.mark.usefixtures("told")
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


@pytest.mark.usefixtures("told")
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


@pytest.mark.usefixtures("told")
def test_of_too_few_rounds_nothing_is_said_about_the_same_graph() -> None:
    control = [*PAIR, Candidate(CONTROL, lasting(1.7, 0.2))]
    assert verdicts(raced([(1, 8)], control, rounds=Rounds(5, 5)))[2].status == "skipped"


def test_a_suspect_cell_leaves_the_check_open(pair: Pair) -> None:
    speed = measure_speed(pair, (8,), 3)

    def reasoned(prefill: Explanation | None, decode: Explanation | None) -> Speed:
        cells = [
            replace(c, results=(c.results[0], replace(c.results[1], explanation=e)))
            for c, e in zip(speed.cells, (prefill, decode), strict=True)
        ]
        return replace(speed, cells=tuple(cells))

    good = Explanation(9, 8, {"Add": 1.0}, 3.0, 1.0, 3.0, False)
    both = speed_check(reasoned(good, good))
    assert both.status == "passed" and both.detail.startswith(
        "2 of 2 speedups above the ceiling, explained by nodes that are gone; "
    )
    table, why = speed_tables(VERIFIED, reasoned(good, good))
    assert not any("suspect" in cell for row in table.rows for cell in row) and len(why.rows) == 2
    bad = replace(good, gone_ms=1.0, suspect=True)
    check = speed_check(reasoned(None, bad))
    assert check.status == "skipped" and check.detail.startswith(
        "decode 8, linearized: 3.00 ms saved at least"
    )
    table, _ = speed_tables(VERIFIED, reasoned(None, bad), brief=True)
    assert [row[-1].endswith("× suspect") for row in table.rows] == [False, False, False, True]
    assert table.columns[-1] == "ceiling" and numeric_columns(table) >= {5}
    assert speed_check(speed).status == "passed" and len(speed_tables(VERIFIED, speed)) == 1


@pytest.mark.usefixtures("told")
def test_a_speedup_above_its_ceiling_that_was_not_profiled_is_not_called_explained() -> None:
    speed = raced([(1, 8)])

    def detail(ceiling: float) -> str:
        cells = [
            replace(c, results=tuple(replace(r, ceiling=ceiling if r.over_base else None) for r in c.results))
            for c in speed.cells
        ]
        return speed_check(replace(speed, cells=tuple(cells))).detail

    assert detail(1.1).startswith("2 of 2 speedups above the ceiling, not profiled; ")
    assert detail(9.0).startswith("no speedup is certainly above its ceiling; ")


@pytest.mark.usefixtures("told")
def test_what_may_be_chance_is_not_called_slower() -> None:
    """A fifth slower in every round, of too few to say so."""
    slow = [PAIR[0], Candidate("linearized", lasting(2.5, 0.25), "base", cost=HALF)]
    assert verdicts(raced([(1, 8)], slow, rounds=Rounds(5, 5)))[1].status == "skipped"
    assert verdicts(raced([(1, 8)], slow, rounds=Rounds(6, 6)))[1].status == "failed"


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
