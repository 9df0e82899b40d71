"""The dtype that calibration reads in, from the setting to the moments and the fits that read again."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.calibrate.moments import load_moments
from nbl_export.calibrate.probe import load_probe
from nbl_export.linearize.plan import load_plan
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import find_model
from nbl_export.models.weights import dtype_of
from nbl_export.progress import Silent
from nbl_export.stages.select import fitting
from nbl_export.workspace import Workspace


@pytest.fixture
def settings(stories_text: Path) -> api.CalibrateSettings:
    return api.CalibrateSettings((str(stories_text),), samples=8, seq_len=64, heldout_samples=2)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16."""
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "bfloat16")


def calibrated(model: Path, out: Path, settings: api.CalibrateSettings) -> tuple[Any, str]:
    api.calibrate(str(model), out, settings)
    moments, metadata = load_moments(Workspace.open(out).moments)
    return moments.layers, metadata["dtype"]


def test_auto_is_what_the_machine_is_fastest_in(
    stories_folder: Path, tmp_path: Path, settings: api.CalibrateSettings, fast: None
) -> None:
    half, dtype = calibrated(stories_folder, tmp_path / "auto", settings)
    assert dtype == "bfloat16"
    exact, dtype = calibrated(stories_folder, tmp_path / "exact", replace(settings, dtype="float32"))
    assert dtype == "float32"
    for index, layer in exact.items():
        gap = np.linalg.norm(half[index].xx - layer.xx) / np.linalg.norm(layer.xx)
        assert 0 < gap < 1e-2, index
    # What graphs are proven against is the model itself.
    probes = [load_probe(Workspace.open(tmp_path / name).probe) for name in ("auto", "exact")]
    for index in exact:
        np.testing.assert_array_equal(probes[0].y[index], probes[1].y[index])


def test_fits_that_read_the_text_again_read_it_in_the_same_dtype(
    stories_folder: Path,
    tmp_path: Path,
    settings: api.CalibrateSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    for name in ("weighted_moments", "sequential_fits"):
        real = getattr(fitting, name)

        def spy(model: torch.nn.Module, *args: Any, real: Any = real, name: str = name) -> Any:
            seen.append((name.partition("_")[0], dtype_of(model)))
            return real(model, *args)

        monkeypatch.setattr(fitting, name, spy)
    calibrated(stories_folder, tmp_path / "out", replace(settings, dtype="bfloat16"))
    api.select(tmp_path / "out", api.SelectSettings(k=2, criterion="cca", fit="weighted"))
    assert seen == [("weighted", "bfloat16")]
    assert load_plan(Workspace.open(tmp_path / "out").plan).fit == "weighted"


def test_a_copy_is_shared_and_lives_no_longer_than_its_users(stories_folder: Path) -> None:
    loaded = LoadedModel(find_model(str(stories_folder)), Silent())
    assert loaded.in_dtype("float32") is loaded.model
    copy = loaded.in_dtype("bfloat16")
    assert dtype_of(copy) == "bfloat16" and dtype_of(loaded.model) == "float32"
    assert loaded.in_dtype("bfloat16") is copy
    gone: list[bool] = []
    weakref.finalize(copy, gone.append, True)
    del copy
    gc.collect()
    assert gone
