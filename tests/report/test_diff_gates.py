"""Every gate against the wrong thing, at its bound exactly, and where it cannot be judged."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

import pytest

from nbl_export.records import Check, Status
from nbl_export.report.diff_facts import SPEED, Opened
from nbl_export.report.diff_gates import Race, gates, races_of, same_text, slowdowns, unlike
from nbl_export.settings import DiffBounds
from nbl_export.verify.parity.figures import MethodLoss
from tests.report.diff_sides import changed, report_of, with_speed


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


# loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1.0, 1.37])
@pytest.mark.parametrize("before", [1.0, 1.1, 1.5495926733233176])
def test_perplexity_at_the_bound_exactly_passes(two: Opened, before: float, bound: float) -> None:
    a, at, above = lossy(two, before), lossy(two, before * bound), lossy(two, before * bound * 1.0001)
    assert gate(a, at, max_ppl_increase=bound).status == "passed"
    assert gate(a, above, max_ppl_increase=bound).status == "failed"
    quotient = above.report.method_loss.perplexity_ratio / before  # type: ignore[union-attr]
    assert gate(a, above, max_ppl_increase=quotient).status == "passed"


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


# speed ------------------------------------------------------------------------------------------------


def test_a_slowdown_is_judged_by_its_interval(two: Opened, three: Opened) -> None:
    least = 1.5 * 0.98 / (1.2 * 1.02)
    assert gate(three, two, max_slowdown=least).status == "passed", "at the bound exactly"
    assert gate(three, two, max_slowdown=least * 0.999).status == "failed"
    noisy = with_speed(two, 1.2, width=0.3)
    check = gate(three, noisy, max_slowdown=1.0)
    assert check.status == "passed" and "0 of 2 surely do not, 2 may be by noise" in check.detail
    assert "surely do not (" in gate(two, three, max_slowdown=1.0).detail


# size -------------------------------------------------------------------------------------------------


def test_size_at_the_bound_exactly_passes(two: Opened) -> None:
    a = sized(two, 1_000_000)
    assert gate(a, sized(two, 1_100_000), max_size_increase=1.1).status == "passed"
    check = gate(a, sized(two, 1_100_001), max_size_increase=1.1)
    assert check.status == "failed"
    assert check.detail == "1.0 MiB in A, 1.0 MiB in B: 1.1000 times, above the 1.1 asked for"
    assert gate(sized(two, 0), a, max_size_increase=2).detail.endswith("no size of a graph is known in A")


def test_held_out_text_is_known_by_its_digest_or_by_the_original(two: Opened, three: Opened) -> None:
    a, b = report_of(two), report_of(three)
    assert same_text(a, b)
    other = replace(b, hashes={**b.hashes, "nbl/text.safetensors": "0" * 64})
    loss = other.method_loss
    assert isinstance(loss, MethodLoss)
    assert same_text(a, other), "the original's perplexity says so"
    for wrong in (
        replace(loss, perplexity_original=loss.perplexity_original * 1.01),
        replace(loss, perplexity_original=nan),
        replace(loss, tokens=loss.tokens + 1),
        None,
    ):
        assert not same_text(a, replace(other, method_loss=wrong))
    neither = [replace(r, hashes={}, method_loss=None) for r in (a, b)]
    assert not same_text(*neither)


# how much slower -------------------------------------------------------------------------------------


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
