"""A real report, for tests that change one thing of it, and one with everything that may be plotted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.selection import Curve
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import Budget


@pytest.fixture
def report(stories_out: Path) -> Report:
    """Without what a profile said of its speed: whether one was asked for depends on the machine."""
    value = load_report(stories_out / "report" / "report.json")
    assert value.speed is not None
    cells = [{**cell, "explanation": None} for cell in value.speed["cells"]]
    checks = tuple(replace(c, status="passed") if c.name == "speed" else c for c in value.checks)
    return replace(value, speed={**value.speed, "cells": cells}, checks=checks)


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
def engine_speed() -> dict[str, Any]:
    latencies = [
        {
            "name": name,
            "context": context,
            "prefill_ms": (prefill := slower * context / 100),
            "prefill_p99_ms": prefill * 1.1,
            "decode_ms": slower,
            "decode_p99_ms": slower * 1.25,
            "tokens_per_second": 1000 / slower,
            "memory_bytes": 2**26,
        }
        for context in (128, 512)
        for name, slower in (("base engine", 2.0), ("linearized engine", 1.6), ("PyTorch eager, base", 9.0))
    ]
    ratios = [{"context": float(c), "prefill": 1.25, "decode": 1.25} for c in (128, 512)]
    return {
        "gpu": "A GPU",
        "compute_capability": "9.0",
        "rounds": 30,
        "latencies": latencies,
        "speedups": ratios,
        "absent": {},
    }


@pytest.fixture
def full(report: Report, curve: Curve, engine_speed: dict[str, Any]) -> Report:
    return replace(report, selection=replace(report.selection, curve=curve), engine_speed=engine_speed)
