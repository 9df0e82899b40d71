"""How much slower: by speedups over the same base, by times over another, and not at all on another machine."""

from __future__ import annotations

from dataclasses import replace
from math import isnan, nan, sqrt

import pytest

from nbl_export.report.diff.races import BENCH, SPEED, Race, races_of, slowdowns, unlike
from nbl_export.report.diff.sides import Opened
from nbl_export.report.schema import Kept
from tests.report.diff.conftest import changed, report_of, with_speed


def race(side: Opened) -> Race:
    return races_of(side)[SPEED]


def test_a_slowdown_is_the_ratio_of_speedups(two: Opened, three: Opened) -> None:
    found = list(slowdowns(race(three), race(two)))
    assert [one.cell for one in found] == ["prefill 16", "decode 16"]
    for one in found:
        assert one.value == pytest.approx(1.5 / 1.2)
        assert one.least == pytest.approx(1.5 * 0.98 / (1.2 * 1.02))
        assert one.most == pytest.approx(1.5 * 1.02 / (1.2 * 0.98))
    mirrored = next(slowdowns(race(two), race(three)))
    assert mirrored.value == pytest.approx(1 / found[0].value) and mirrored.least == pytest.approx(
        1 / found[0].most
    )


def test_over_another_base_times_are_compared(two: Opened) -> None:
    """Both graphs twice as slow are as fast beside each other."""
    report = report_of(two)
    speed = report.speed
    assert speed is not None
    cells = (
        replace(
            cell,
            results=tuple(
                replace(
                    r,
                    timing=replace(
                        r.timing, **{n: 2 * getattr(r.timing, n) for n in ("median_ms", "low_ms", "high_ms")}
                    ),
                )
                for r in cell.results
            ),
        )
        for cell in speed.cells
    )
    slower = changed(two, speed=replace(speed, cells=tuple(cells)))
    assert all(one.value == 1 for one in slowdowns(race(two), race(slower)))
    graph = replace(report.graph, before=replace(report.graph.before, nodes=999))
    other = changed(slower, graph=graph)
    notch = 1.57 * 0.02 / sqrt(9)
    for one in slowdowns(race(two), race(other)):
        assert one.value == pytest.approx(2)
        assert one.least == pytest.approx(2 * (1 - notch) / (1 + notch))
    assert unlike(race(two), race(other))[0] == "over another base"
    same_graph = changed(two, graph=replace(report.graph, before=replace(report.graph.before, file_bytes=1)))
    assert unlike(race(two), race(same_graph))[0] is None, "names in a file take no time"


def test_of_few_rounds_no_time_is_known(two: Opened) -> None:
    other = with_speed(changed(two, graph=replace(report_of(two).graph, kv_cache="shared")), 1.2, rounds=5)
    assert all(isnan(one.value) for one in slowdowns(race(two), race(other)))


@pytest.mark.parametrize("bound", [nan, float("inf"), float("-inf"), 0.0])
def test_without_an_interval_nothing_is_known(two: Opened, bound: float) -> None:
    speed = report_of(two).speed
    assert speed is not None
    cells = (
        replace(
            c,
            results=tuple(
                replace(r, over_base=replace(r.over_base, most=bound)) if r.over_base else r
                for r in c.results
            ),
        )
        for c in speed.cells
    )
    other = changed(two, speed=replace(speed, cells=tuple(cells)))
    assert all(isnan(one.value) and isnan(one.least) for one in slowdowns(race(two), race(other)))


def test_another_machine_and_other_versions(two: Opened) -> None:
    report = report_of(two)
    env = report.environment
    for elsewhere in (replace(env, processor="A chip"), replace(env, cores=96), replace(env, system="Other")):
        why, notes = unlike(race(two), race(changed(two, environment=elsewhere)))
        assert why == "on another machine" and "do not compare" in notes[0]
    assert report.speed is not None
    threads = replace(report.speed, machine=replace(report.speed.machine, threads=64))
    assert unlike(race(two), race(changed(two, speed=threads)))[0] == "on another machine"
    newer = replace(env, packages={**env.packages, "onnxruntime": "99"}, memory_gib=1.0)
    why, notes = unlike(race(two), race(changed(two, environment=newer)))
    assert why is None and f"onnxruntime {env.packages['onnxruntime']} → 99" in notes[0]
    assert unlike(race(two), None) == (None, ()) == unlike(race(two), race(two))


def test_a_kept_speed_is_of_the_machine_that_measured_it(two: Opened) -> None:
    report = report_of(two)
    there = Kept("then", "1", replace(report.environment, processor="A chip"), {})
    kept = changed(two, kept={"speed": there})
    assert unlike(race(two), race(kept))[0] == "on another machine"


def test_a_report_without_speed_has_no_race(two: Opened) -> None:
    assert races_of(changed(two, speed=None)) == {}
    assert BENCH not in races_of(two)
