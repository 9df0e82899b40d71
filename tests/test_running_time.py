"""Seconds in which the process ran."""

from __future__ import annotations

import pytest

from nbl_export import running_time
from nbl_export.running_time import RunningTime


def test_what_a_process_stood_still_in_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(running_time.time, "monotonic", lambda: now[0])
    clock = RunningTime(step=1)
    passed = []
    for later in (100.25, 100.75, 3_600.0, 3_600.5):
        now[0] = later
        passed.append(clock.since_last())
    assert passed == [0.25, 0.5, 1, 0.5]
