"""Every gate against the wrong thing, at its bound exactly, and where it cannot be judged."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from nbl_export.checks import Check, Status
from nbl_export.report.diff.gates import gates
from nbl_export.report.diff.sides import Opened, opened
from nbl_export.settings import DiffBounds
from nbl_export.verify.loss.figures import MethodLoss
from tests.report.diff.conftest import changed, report_of, with_speed
from tests.report.test_evaluation import evaluation

OLD = Path(__file__).parent.parent / "version_1"


def gate(a: Opened, b: Opened, **bounds: float) -> Check:
    """The verdict on the one bound, or on the checks."""
    return gates(a, b, DiffBounds(**bounds))[-1]


def lossy(side: Opened, ratio: float, **more: Any) -> Opened:
    loss = report_of(side).method_loss
    assert isinstance(loss, MethodLoss)
    return changed(side, method_loss=replace(loss, perplexity_ratio=ratio, **more))


def sized(side: Opened, size: int) -> Opened:
    graph = report_of(side).graph
    return changed(side, graph=replace(graph, after=replace(graph.after, file_bytes=size)))


# checks -----------------------------------------------------------------------------------------------


def judged(side: Opened, **statuses: Status) -> Opened:
    return changed(side, checks=tuple(Check(n, s, f"why {n}") for n, s in statuses.items()))


def test_a_check_that_fails_now_is_a_regression_without_any_bound(two: Opened) -> None:
    good, bad = judged(two, parity="passed"), judged(two, parity="failed")
    (check,) = gates(good, bad, DiffBounds())
    assert check == Check("checks", "failed", "parity failed in B and was passed in A (why parity)")
    assert gates(bad, good, DiffBounds())[0].status == "passed"
    assert gates(good, good, DiffBounds())[0].detail == "none failed in B that had not in A"


@pytest.mark.parametrize(
    ("before", "said"),
    [({"parity": "skipped"}, "was skipped in A"), ({"other": "passed"}, "was not there in A")],
)
def test_a_check_that_was_not_judged_before_fails_too(
    two: Opened, before: dict[str, Status], said: str
) -> None:
    check = gate(judged(two, **before), judged(two, parity="failed"))
    assert check.status == "failed" and said in check.detail


def test_a_check_that_failed_before_is_no_regression_and_is_said(two: Opened) -> None:
    bad = judged(two, parity="failed")
    check = gate(bad, bad)
    assert check.status == "passed" and "1 failed in both" in check.detail


@pytest.mark.parametrize("after", [{"speed": "passed", "parity": "skipped"}, {"speed": "passed"}])
def test_a_check_that_is_no_longer_judged_is_said(two: Opened, after: dict[str, Status]) -> None:
    check = gate(judged(two, speed="passed", parity="passed"), judged(two, **after))
    assert check.status == "passed" and "passed in A and not judged in B: parity" in check.detail


def test_graphs_and_evaluations_without_checks_have_no_such_gate(stories_out: Path) -> None:
    graph = opened(stories_out / "model.onnx")
    assert gates(graph, graph, DiffBounds()) == ()
    scores = Opened(Path("e"), "eval", (), evaluation=evaluation())
    assert gates(scores, scores, DiffBounds()) == ()
    failed = replace(scores, evaluation=evaluation(checks=(Check("mean recovery", "failed", "90 %"),)))
    assert gates(scores, failed, DiffBounds())[0].status == "failed"


# loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1.0, 1.1, 1.37, 2.0])
@pytest.mark.parametrize("before", [1.0, 1.1, 1.5495926733233176])
def test_perplexity_at_the_bound_exactly_passes(two: Opened, before: float, bound: float) -> None:
    a, at, above = lossy(two, before), lossy(two, before * bound), lossy(two, before * bound * 1.0001)
    assert gate(a, at, max_ppl_increase=bound).status == "passed"
    assert gate(a, above, max_ppl_increase=bound).status == "failed"
    quotient = above.report.method_loss.perplexity_ratio / before  # type: ignore[union-attr]
    assert gate(a, above, max_ppl_increase=quotient).status == "passed"


def test_the_sentence_has_both_ratios(two: Opened) -> None:
    check = gate(lossy(two, 1.2), lossy(two, 1.5), max_ppl_increase=1.1)
    assert check == Check(
        "perplexity increase",
        "failed",
        "perplexity ratio 1.2000 in A, 1.5000 in B: 1.2500 times, above the 1.1 asked for",
    )


@pytest.mark.parametrize("ratio", [nan, inf])
def test_a_loss_that_is_no_number_has_failed(two: Opened, ratio: float) -> None:
    assert gate(two, lossy(two, ratio), max_ppl_increase=100).status == "failed"
    assert gate(lossy(two, nan), two, max_ppl_increase=100).status == "failed"


def test_other_text_cannot_be_judged(two: Opened) -> None:
    other = lossy(two, 1.0, perplexity_original=99.0)
    assert gate(two, other, max_ppl_increase=9).status == "passed", "the digest says that it is the same"
    other = changed(other, hashes={})
    check = gate(two, other, max_ppl_increase=9)
    assert check.status == "failed" and check.detail.startswith(
        "cannot be judged: the ratios are of different"
    )


def test_a_loss_of_one_side_cannot_be_judged(two: Opened) -> None:
    without = changed(two, method_loss=None)
    for a, b, where in ((two, without, "B"), (without, two, "A"), (without, without, "either")):
        check = gate(a, b, max_ppl_increase=9)
        assert check == Check(
            "perplexity increase", "failed", f"cannot be judged: there is no perplexity ratio in {where}"
        )
    encoder = opened(OLD / "encoder.json")
    assert gate(encoder, encoder, max_ppl_increase=9).detail.endswith("no perplexity ratio in either")


# speed ------------------------------------------------------------------------------------------------


def test_slower_by_more_than_the_bound_fails_and_names_the_cells(two: Opened, three: Opened) -> None:
    check = gate(three, two, max_slowdown=1.1)
    assert check.status == "failed"
    assert check.detail == (
        "prefill 16 takes 1.25 times as long, 1.20 at least; decode 16 takes 1.25 times as long, 1.20 at least: above "
        "the 1.1 asked for"
    )
    assert gate(two, three, max_slowdown=1.0).status == "passed"


def test_a_slowdown_is_judged_by_its_interval(two: Opened, three: Opened) -> None:
    least = 1.5 * 0.98 / (1.2 * 1.02)
    assert gate(three, two, max_slowdown=least).status == "passed", "at the bound exactly"
    assert gate(three, two, max_slowdown=least * 0.999).status == "failed"
    noisy = with_speed(two, 1.2, width=0.3)
    check = gate(three, noisy, max_slowdown=1.0)
    assert check.status == "passed" and "0 of 2 surely do not, 2 may be by noise" in check.detail
    assert "surely do not (" in gate(two, three, max_slowdown=1.0).detail


def test_a_cell_that_is_not_resolved_is_judged_too(two: Opened, three: Opened) -> None:
    """A linearized graph that gains nothing any more has an interval around 1, and is slower than one that gained."""
    speed = with_speed(two, 1.0).report.speed  # type: ignore[union-attr]
    assert speed is not None
    cells = (
        replace(
            c,
            results=tuple(
                replace(r, over_base=replace(r.over_base, resolved=False)) if r.over_base else r
                for r in c.results
            ),
        )
        for c in speed.cells
    )
    nothing = changed(two, speed=replace(speed, cells=tuple(cells)))
    assert gate(three, nothing, max_slowdown=1.1).status == "failed"


def test_another_machine_cannot_be_judged(two: Opened) -> None:
    there = replace(report_of(two).environment, processor="A chip")
    check = gate(two, changed(two, environment=there), max_slowdown=9)
    assert (
        check.status == "failed"
        and "cannot be judged: speed: Times and speedups do not compare" in check.detail
    )
    assert "A chip" in check.detail


def test_speed_of_one_side_cannot_be_judged(two: Opened) -> None:
    without = changed(two, speed=None)
    assert gate(two, without, max_slowdown=9).detail == "cannot be judged: speed was measured in A alone"
    assert gate(without, two, max_slowdown=9).detail == "cannot be judged: speed was measured in B alone"
    assert gate(without, without, max_slowdown=9) == Check(
        "slowdown", "failed", "cannot be judged: nothing was timed beside its base"
    )


def test_a_cell_of_one_side_cannot_be_judged(two: Opened) -> None:
    speed = report_of(two).speed
    assert speed is not None
    fewer = changed(two, speed=replace(speed, cells=speed.cells[:1]))
    for a, b in ((two, fewer), (fewer, two)):
        check = gate(a, b, max_slowdown=9)
        assert check == Check("slowdown", "failed", "cannot be judged: decode 16 is on one side alone")


def test_few_rounds_cannot_be_judged(two: Opened) -> None:
    """Of fewer than six an interval has no bounds."""
    few = with_speed(two, 1.2, width=inf)
    for a, b in ((two, few), (few, two), (few, few)):
        check = gate(a, b, max_slowdown=9)
        assert check.status == "failed"
        assert check.detail.startswith(
            "cannot be judged: prefill 16 has no 95 % interval: measure at least six rounds"
        )


def test_a_long_list_is_cut(two: Opened) -> None:
    speed = report_of(two).speed
    assert speed is not None
    cells = tuple(replace(speed.cells[0], context=n) for n in range(100, 109))
    check = gate(two, changed(two, speed=replace(speed, cells=cells)), max_slowdown=9)
    assert check.detail.count("is on one side alone") == 5 and check.detail.endswith("; and 6 more")


# size -------------------------------------------------------------------------------------------------


def test_size_at_the_bound_exactly_passes(two: Opened) -> None:
    a = sized(two, 1_000_000)
    assert gate(a, sized(two, 1_100_000), max_size_increase=1.1).status == "passed"
    check = gate(a, sized(two, 1_100_001), max_size_increase=1.1)
    assert check.status == "failed"
    assert check.detail == "1.0 MiB in A, 1.0 MiB in B: 1.1000 times, above the 1.1 asked for"
    assert gate(sized(two, 0), a, max_size_increase=2).detail.endswith("no size of a graph is known in A")


def test_graphs_have_a_size_and_nothing_else(stories_out: Path) -> None:
    a, b = (opened(stories_out / name) for name in ("model.onnx", "baseline"))
    assert gate(a, b, max_size_increase=1.0).status == "failed"
    assert gate(b, a, max_size_increase=1.0).status == "passed"
    assert gate(a, a, max_ppl_increase=9).status == gate(a, a, max_slowdown=9).status == "failed"


def test_each_bound_has_a_verdict(two: Opened) -> None:
    bounds = DiffBounds(1.0, 1.0, 1.0)
    names = ["checks", "perplexity increase", "slowdown", "size increase"]
    found = gates(two, two, bounds)
    assert [check.name for check in found] == names
    # Nothing is surely slower than itself.
    assert {check.status for check in found} == {"passed"}
