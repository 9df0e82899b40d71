"""Races without a clock, and a real pair of graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.verify.speed import race as module


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every candidate take the seconds that it says."""
    monkeypatch.setattr(module, "prefill_seconds", lambda prompt: (prompt.seconds["prefill"],))
    monkeypatch.setattr(module, "decode_seconds", lambda prompt, steps: (prompt.seconds["decode"],) * steps)
    monkeypatch.setattr("nbl_export.verify.speed.race._SETTLE", 0)


@pytest.fixture
def pair(stories_out: Path) -> tuple[Path, Path]:
    """The unmodified graph and the linearized one."""
    return stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"
