"""Rates of this machine are those of what it does, and measuring them is quick."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from nbl_export.stages import machine
from nbl_export.stages.machine import rates

CPU = torch.device("cpu")


def test_rates_are_of_this_machine_and_take_a_moment(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 22))
    start = time.perf_counter()
    found = rates(torch.float32, CPU, file)
    assert time.perf_counter() - start < 20  # four measurements of 0.4 s, beside other work
    # Between a slow processor and the fastest accelerator.
    assert 1e8 < found.exact < 1e15 and 1e8 < found.fast < 1e16
    assert 1e6 < found.read <= 1e12 and 1e7 < found.hashed < 1e11


def test_a_rate_is_that_of_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 2.0, 2.0, 2.5, 2.5, 9.0])
    monkeypatch.setattr(machine, "_SECONDS", 5)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine._per_second(lambda: None, 3.0) == 6.0  # of 2, 0.5 and 6.5 seconds


def test_an_empty_file_has_a_rate(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert rates(torch.float32, CPU, tmp_path / "empty").read >= 0
