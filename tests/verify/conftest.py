"""Graphs of a finished run in every form, and a clock that only tests move."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from nbl_export.calibrate.text import CalibrationText, load_text
from nbl_export.linearize.plan import Plan
from nbl_export.verify.speed import ceiling, race
from nbl_export.workspace import Workspace
from tests.fixtures_graph import plan_by_hand
from tests.runtime.fake_tensorrt import Graphs, graphs_of
from tests.verify.measured import LAYERS


@pytest.fixture(scope="module")
def graphs(stories_model: Any, stories_out: Path) -> Graphs:
    return graphs_of(stories_model, stories_out)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda _: None)
    for module in (ceiling, race):
        monkeypatch.setattr(module, "time", fake)
    return now


@pytest.fixture(scope="module")
def text(stories_out: Path) -> CalibrationText:
    return load_text(Workspace.open(stories_out).text)


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)
