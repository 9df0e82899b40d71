"""Rates that are kept are those that were measured, and for nothing else than what they were measured of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.verify.speed import roofline
from nbl_export.verify.speed.values import Roofline
from tests import kept, measured_once, replaced

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What was measured; each time the machine is faster."""
    made: Calls = []

    def measured(device: str, dtype: str) -> Roofline:
        made.append((device, dtype, torch.get_num_threads()))
        return Roofline(device, dtype, torch.get_num_threads(), 1e9 * len(made), 1e9 / 3)

    monkeypatch.setattr(replaced, "HARMLESS", (*replaced.HARMLESS, replaced, kept, measured_once))
    monkeypatch.setattr(kept, "_folder", [tmp_path])
    monkeypatch.setattr(measured_once, "_measure", measured)
    return made


def test_the_same_is_measured_once(calls: Calls) -> None:
    first = roofline.measure_roofline()
    assert first == roofline.cpu_machine().roofline == Roofline("cpu", "float32", 1, 1e9, 1e9 / 3)
    assert calls == [("cpu", "float32", 1)]


def test_another_precision_or_number_of_threads_is_another(calls: Calls) -> None:
    roofline.measure_roofline()
    roofline.measure_roofline(dtype="bfloat16")
    torch.set_num_threads(2)
    try:
        roofline.measure_roofline()
    finally:
        torch.set_num_threads(1)
    assert calls == [("cpu", "float32", 1), ("cpu", "bfloat16", 1), ("cpu", "float32", 2)]


def test_a_test_that_replaced_something_of_it_measures(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline.measure_roofline()
    monkeypatch.setattr(roofline, "_REPEATS", 1)
    roofline.measure_roofline()
    assert len(calls) == 2


def test_its_own_tests_measure(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_CURRENT_TEST", f"tests/{measured_once.MEASURED}::test (call)")
    roofline.measure_roofline()
    roofline.measure_roofline()
    assert len(calls) == 2
