"""A real report, for tests that change one thing of it, and one with everything that may be plotted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.linearize.selection import Curve, CurvePoint
from nbl_export.report.diff_facts import Opened, opened
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import Budget
from nbl_export.verify.speed.values import CandidateInfo, CellResult, Machine, Ratio, Result, Speed, Timing
from tests.report.diff_sides import with_speed


@pytest.fixture
def report(stories_out: Path) -> Report:
    return load_report(stories_out / "report" / "report.json")


@pytest.fixture
def curve() -> Curve:
    """What each K costs, out of order, one decode time missing."""
    points = [
        CurvePoint(
            k=k,
            layers=tuple(range(5 - k, 5)),
            kl=0.01 * 4**k,
            kl_se=0.001 * k,
            perplexity_ratio=1 + 0.02 * k * k,
            perplexity_ratio_se=0.005 * k,
            prefill_speedup=1 + 0.1 * k,
            decode_speedup=None if k == 3 else 1 + 0.05 * k,
        )
        for k in (2, 1, 4, 3)
    ]
    budget = Budget(max_kl=0.5, max_perplexity_ratio=1.2, min_speedup=1.07)
    return Curve(tuple(points), chosen=2, budget=budget, context=512, tokens=4096, documents=12)


@pytest.fixture
def engine_speed() -> Speed:
    times = {"base engine": 2.0, "linearized engine": 1.6, "PyTorch eager, base": 9.0}

    def result(name: str, ms: float, tokens: int) -> Result:
        timing = Timing(ms, 0.95 * ms, 1.05 * ms, 1.25 * ms)
        over = Ratio(1.25, 1.2, 1.3, 1.1, 1.4, True) if name == "linearized engine" else None
        return Result(name, timing, 30, 1e3 * tokens / ms, 2**26, over_base=over)

    cells = [
        CellResult(
            phase,
            1,
            context,
            tuple(
                result(
                    name,
                    ms * (context / 100 if phase == "prefill" else 1),
                    1 if phase == "decode" else context,
                )
                for name, ms in times.items()
            ),
        )
        for context in (128, 512)
        for phase in ("prefill", "decode")
    ]
    infos = [CandidateInfo(name, "base engine" if "linearized" in name else None) for name in times]
    machine = Machine("A GPU", compute_capability="9.0")
    return Speed(machine, 30, tuple(infos), tuple(cells), "linearized engine")


@pytest.fixture
def full(report: Report, curve: Curve, engine_speed: Speed) -> Report:
    return replace(report, selection=replace(report.selection, curve=curve), engine_speed=engine_speed)


@pytest.fixture
def two(stories_out: Path) -> Opened:
    """The run with K = 2, whose linearized graph is 1.2 times as fast."""
    return with_speed(opened(stories_out), 1.2)


@pytest.fixture
def three(stories_three: Path) -> Opened:
    """The run with K = 3, whose linearized graph is 1.5 times as fast."""
    return with_speed(opened(stories_three), 1.5)
