"""Both runs as they were measured, with speeds that are known: six rounds and more, and intervals by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbl_export.report.diff_facts import Opened
from nbl_export.report.schema import Report
from nbl_export.verify.speed.values import Ratio, Speed


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
    assert side.report is not None
    report = replace(side.report, **changes)
    return replace(side, report=report, bench=report.bench)


def with_speed(side: Opened, factor: float = 1.0, width: float = 0.02, rounds: int = 9) -> Opened:
    assert side.report is not None and side.report.speed is not None
    return changed(side, speed=sped(side.report.speed, factor, width, rounds))


def report_of(side: Opened) -> Report:
    assert side.report is not None
    return side.report
