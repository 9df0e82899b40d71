"""A real report, one with everything that may be plotted, and two sides of a comparison with speeds that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.linearize.selection import Curve, CurvePoint
from nbl_export.report.diff_facts import Opened, opened
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import Budget
from nbl_export.verify.speed.values import CandidateInfo, CellResult, Machine, Ratio, Result, Speed, Timing


def sped(speed: Speed, factor: float = 1.0, width: float = 0.02, rounds: int = 9) -> Speed:
    """Every linearized candidate ``factor`` times as fast as its base, known to ``width``; the base takes 10 ms."""
    ratio = Ratio(factor, factor, factor, factor * (1 - width), factor * (1 + width), True)

    def timed(result: Any) -> Any:
        own = result.name == speed.linearized
        ms = 10 / factor if own else 10.0
        timing = replace(result.timing, median_ms=ms, low_ms=ms * 0.99, high_ms=ms * 1.01)
        return replace(
            result,
            timing=timing,
            rounds=rounds,
            over_base=ratio if own else None,
            linearized_over=None,
        )

    cells = (replace(cell, results=tuple(map(timed, cell.results))) for cell in speed.cells)
    return replace(speed, cells=tuple(cells))


def changed(side: Opened, **changes: Any) -> Opened:
    """The side with another report."""
    report = replace(report_of(side), **changes)
    return replace(side, report=report, bench=report.bench)


def with_speed(side: Opened, factor: float = 1.0, width: float = 0.02, rounds: int = 9) -> Opened:
    speed: Any = report_of(side).speed
    return changed(side, speed=sped(speed, factor, width, rounds))


def report_of(side: Opened) -> Report:
    assert side.report is not None
    return side.report


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
