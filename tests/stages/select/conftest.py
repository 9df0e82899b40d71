"""A calibrated and exported run to select from, and what is counted while that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.linearize.loss import LossMeter
from nbl_export.stages.choosing import SpeedMeter
from tests.stages.select.by_hand import forget


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are measured in float32, whatever the processor is fastest in."""
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "float32")


@pytest.fixture(scope="session")
def calibrated(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on little text that was calibrated and exported: the finished one without what came after."""
    out = Path(shutil.copytree(stories_out, tmp_path_factory.mktemp("stages") / "out"))
    forget(out, "select", "rewrite", "verify")
    for path in (
        out / "nbl" / "plan.json",
        out / "nbl" / "plan.safetensors",
        out / "nbl" / "candidates.json",
    ):
        path.unlink()
    return out


@pytest.fixture
def out(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "out", copy_function=shutil.copy2))


def exported(model: Path, text: Path, out: Path, blocks: Any) -> Path:
    """``out``, calibrated on little text for these ``blocks``, and exported."""
    api.calibrate(model, out, api.CalibrateSettings((str(text),), 32, 128, heldout_samples=8, blocks=blocks))
    api.export(out)
    return out


@pytest.fixture(scope="session")
def both(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which attention and MLPs are calibrated, and that is exported."""
    return exported(stories_folder, stories_text, tmp_path_factory.mktemp("workload") / "out", "both")


@pytest.fixture
def both_out(both: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(both, tmp_path / "out", copy_function=shutil.copy2))


@pytest.fixture(scope="session")
def everything(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which attention, MLPs and spans of layers are calibrated, and that is exported."""
    return exported(stories_folder, stories_text, tmp_path_factory.mktemp("everything") / "out", "all")


@pytest.fixture
def all_out(everything: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(everything, tmp_path / "out", copy_function=shutil.copy2))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every measurement of a loss."""
    found: list[int] = []
    plain = LossMeter.measure_within

    def counted(self: LossMeter, change: Any, first: int, *more: Any) -> Any:
        found.append(first)
        return plain(self, change, first, *more)

    monkeypatch.setattr(LossMeter, "measure_within", counted)
    return found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """K layers are 1 + K/10 times as fast; grows by each K that is timed."""
    found: list[int] = []

    def call(self: SpeedMeter, k: int) -> dict[str, float]:
        if k not in self.found:
            found.append(k)
            self.found[k] = {"prefill_speedup": 1 + k / 10, "decode_speedup": 1 + k / 8}
        return self.found[k]

    monkeypatch.setattr(SpeedMeter, "__call__", call)
    return found
