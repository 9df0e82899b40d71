"""A real report, for tests that change one thing of it, and one with everything that may be plotted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.selection import Curve, Line
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import Budget
from nbl_export.verify.speed.values import CandidateInfo, CellResult, Machine, Ratio, Result, Speed, Timing


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


def line(name: str, gain: float) -> Line:
    """A way that gains so much with each block."""
    points = [
        CurvePoint(k, tuple(range(k)), 0.1 * k, 0.01, 1 + 0.1 * k, 0.01, workload_speedup=1 + gain * k)
        for k in (1, 2)
    ]
    return Line(name, tuple(points))


@pytest.fixture
def frontier(curve: Curve) -> Curve:
    """For a workload, with the other ways."""
    points = tuple(replace(p, workload_speedup=1 + 0.1 * p.k) for p in curve.points)
    others = (line("attention", 0.05), line("MLPs", 0.02), line("dropped", 0.2))
    return replace(curve, points=points, name="both", others=others)


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
def full(report: Report, frontier: Curve, engine_speed: Speed) -> Report:
    return replace(report, selection=replace(report.selection, curve=frontier), engine_speed=engine_speed)
