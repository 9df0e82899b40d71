"""The bench: who meets whom, what stands beside each figure, and which speedups are believed. No time is asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.ceiling import ceiling
from nbl_export.verify.speed.harness import Harness
from nbl_export.verify.speed.memory import ordered
from nbl_export.verify.speed.race import Rounds
from nbl_export.verify.speed.values import Machine
from tests.verify.speed.raced import COST, HALF, MACHINE, PAIR, ROOFLINE, Timed, raced, ran, verdicts

pytestmark = pytest.mark.usefixtures("told")


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


def test_the_linearized_graph_gets_its_memory_first() -> None:
    order: list[str] = []

    def noted(name: str) -> Any:
        return lambda *_: order.append(name) or Timed(1.0, 1.0)

    found = ran([(1, 8)], [Candidate(name, noted(name)) for name in ("base", "linearized", "other")])
    assert order == ["linearized", "base", "other"]
    assert [r.name for r in found[0].results] == ["base", "linearized", "other"]
