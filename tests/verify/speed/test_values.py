"""The values of a race: work by hand, and what is read off cells."""

from __future__ import annotations

from dataclasses import replace

from nbl_export.records import from_json, to_json
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
from tests.verify.speed.raced import UNEVEN


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


def test_costs_as_json() -> None:
    assert to_json(UNEVEN) == {
        "weight_macs": 100,
        "attention_macs_per_context": 3,
        "weight_bytes": 400,
        "kv_bytes_per_token": 7,
        "last_macs": 60,
        "last_bytes": 240,
    }


def test_the_least_time_is_the_sum_over_pieces_of_what_bounds_each() -> None:
    machine = Roofline("cpu", "float32", 2, macs_per_second=4.0, bytes_per_second=10.0)
    # 8/4 against 10/10, then 4/4 against 30/10: the pieces follow each other.
    assert machine.seconds([Work(8, 10), Work(4, 30)]) == 2 + 3
    # As one piece they would overlap.
    assert machine.seconds([Work(12, 40)]) == 4 and machine.seconds([]) == 0


# cells -------------------------------------------------------------------------------------------


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


def test_cells_have_the_names_of_tables() -> None:
    assert [c.name for c in CELLS] == ["prefill 2,048", "decode 2,048", "prefill 4 × 8"]
    assert [c.size for c in CELLS] == ["2,048", "2,048", "4 × 8"]


def test_a_cell_knows_who_was_timed() -> None:
    first = CELLS[0]
    assert first.of("linearized") is first.results[1]
    assert first.of("other") is None and CELLS[1].of("linearized") is None


def test_only_who_was_timed_beside_its_base_has_a_speedup() -> None:
    """Of the second cell it was absent; in the third the ratio is of another candidate."""
    assert SPEED.speedups() == [(CELLS[0], CELLS[0].results[1], OVER)]
    other = replace(SPEED, linearized="other")
    assert other.speedups() == [(CELLS[2], CELLS[2].results[1], OVER)]
    assert (SPEED.base, other.base, replace(SPEED, linearized="base").base) == ("base", "elsewhere", None)


def test_phases_reasons_and_absences_are_gathered_from_all_cells() -> None:
    assert SPEED.phases == ("prefill", "decode")
    assert SPEED.absent() == {
        ("other", "no room"): [CELLS[0], CELLS[1]],
        ("linearized", "failed"): [CELLS[1]],
    }


def test_a_speedup_is_above_its_ceiling_for_certain_or_perhaps_or_not() -> None:
    one = replace(result("linearized", OVER), ceiling=1.1)
    assert one.above_ceiling is True
    assert replace(one, ceiling=1.3).above_ceiling is None  # the interval begins at 1.2
    for other in (replace(one, ceiling=1.5), replace(one, ceiling=None), replace(one, over_base=None)):
        assert other.above_ceiling is False


def test_percentiles_are_there_if_any_cell_has_one() -> None:
    assert not SPEED.has_percentiles
    one = replace(CELLS[2], results=(result("base"), result("other", p99=9.0)))
    assert replace(SPEED, cells=(*CELLS[:2], one)).has_percentiles


def test_a_speed_comes_back_from_json_with_intervals_that_have_no_bounds() -> None:
    unbounded = replace(OVER, least=float("-inf"), most=float("inf"), resolved=False)
    cell = replace(CELLS[0], results=(result("linearized", unbounded),))
    machine = Machine("cpu", 2, roofline=Roofline("cpu", "float32", None, 1.0, 2.0))
    speed = replace(SPEED, cells=(cell,), machine=machine)
    raw = to_json(speed)
    assert raw["cells"][0]["results"][0]["over_base"]["most"] == "inf"
    assert from_json(Speed, raw, "it", "do it again") == speed
