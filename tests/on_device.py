"""What every stage computes on another device than the CPU, next to the CPU's own: the tests of any device.

A file that imports them has a fixture ``device``: a real one, or the virtual one of :mod:`tests.virtual_device`.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.calibrate.collect import collect_moments, identity_of, moments_of
from nbl_export.calibrate.moments import ARRAYS, Moments, MomentsFolder, load_moments
from nbl_export.linearize.plan import load_plan
from nbl_export.models.layers import hidden_size
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.weights import device_of, in_precision
from nbl_export.progress import Silent
from nbl_export.verify.parity.unmodified import first_divergence
from nbl_export.workspace import Workspace
from tests.tiny import text_encoder, write_text

TEXT = api.CalibrateSettings(("self",), samples=8, seq_len=32, heldout_samples=2, selection_samples=2)
PLAIN = replace(TEXT, calibration_dtype="float32")
CHECKS = api.VerifySettings(speed=False, decode_steps=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "text.jsonl"))


@pytest.fixture(scope="module")
def calibrated(
    device: torch.device, tiny_folder: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Calibrated on the device, on text of a file; copy it before changing it."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    api.calibrate(tiny_folder, out, replace(PLAIN, calibration=(text,), device="cuda"))
    return out


@pytest.fixture(scope="module")
def finished(
    device: torch.device, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, api.Report]:
    """A whole run on the device: text of the model's own, a repair, and all that verify measures."""
    out = tmp_path_factory.mktemp("finished") / "out"
    selection = api.SelectSettings(k=1, criterion="kl", repair=2, device="cuda")
    checks = replace(CHECKS, device="cuda")
    return out, api.run(tiny_folder, out, selection, replace(TEXT, device="cuda"), checks)


def on(device: torch.device, folder: Path, dtype: str = "float32") -> torch.nn.Module:
    return in_precision(load_model(find_model(str(folder))), dtype, device)


def close(found: Any, expected: Any, relative: float = 1e-4) -> None:
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


def same_moments(found: Moments, expected: Moments) -> None:
    assert set(found.layers) == set(expected.layers)
    for index, layer in expected.layers.items():
        for name in ARRAYS:
            close(getattr(found.layers[index], name), getattr(layer, name))


def test_a_whole_run(finished: tuple[Path, api.Report], device: torch.device) -> None:
    out, report = finished
    assert report.passed, report.checks
    assert report.parity and report.method_loss
    ws = Workspace.open(out)
    for stage in ("calibrate", "select", "verify"):
        record = ws.record(stage)
        assert record and record.device.startswith(f"{device}, ")
    assert "device" not in ws.record("calibrate").settings  # type: ignore[union-attr]
    assert load_plan(ws.plan).adapters


def test_moments_are_those_of_the_cpu(calibrated: Path, tiny_folder: Path, text: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    api.calibrate(tiny_folder, own, replace(PLAIN, calibration=(text,), device="cpu"))
    found, expected = (load_moments(Workspace.open(out).moments) for out in (calibrated, own))
    same_moments(found[0], expected[0])
    assert {*found[1]["identity"]} == {*expected[1]["identity"], "device"}


def test_what_a_device_made_is_used_without_it(
    calibrated: Path, tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    """The calibration is kept, and everything goes on from it on the CPU."""
    out = Path(shutil.copytree(calibrated, tmp_path / "out"))
    before = Workspace.open(out).record("calibrate")
    asked = replace(PLAIN, calibration=(text,), device="cpu")
    report = api.run(
        tiny_folder,
        out,
        api.SelectSettings(k=1, criterion="cca", device="cpu"),
        asked,
        replace(CHECKS, device="cpu"),
    )
    assert report.passed, report.checks
    assert Workspace.open(out).record("calibrate") == before


@pytest.mark.parametrize(
    "asked",
    [
        {"criterion": "greedy", "rank": 4},
        {"criterion": "nmse", "fit": "weighted", "ridge": None},
        {"criterion": "cca", "fit": "sequential", "fit_input": "residual"},
        {"criterion": "cca", "repair": 2, "repair_rank": 2},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_a_selection_is_that_of_the_cpu(
    calibrated: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "float32")
    plans = []
    for device in ("cuda", "cpu"):
        out = Path(shutil.copytree(calibrated, tmp_path / device))
        plans.append(api.select(out, api.SelectSettings(k=2, device=device, **asked)))
    found, expected = plans
    assert found.chosen == expected.chosen
    assert [*found.adapters] == [*expected.adapters]
    for index, layer in expected.layers.items():
        close(found.layers[index].w, layer.w, 1e-2)


def test_the_losses_of_a_device_are_its_own(calibrated: Path, tmp_path: Path) -> None:
    """What one device measured is not taken for another's, which may be an interrupted selection's."""
    out = Path(shutil.copytree(calibrated, tmp_path / "out"))
    for device in ("cuda", "cpu"):
        api.select(out, api.SelectSettings(k=1, criterion="kl", device=device))
        Workspace.open(out).forget("select")
    measured = Workspace.open(out).measured.read_text()
    api.select(out, api.SelectSettings(k=1, criterion="kl", device="cpu"))
    assert Workspace.open(out).measured.read_text() == measured


def test_the_first_layer_that_differs_is_found(
    finished: tuple[Path, api.Report], device: torch.device, tiny_folder: Path
) -> None:
    ws = Workspace.open(finished[0])
    assert first_divergence(on(device, tiny_folder), load_plan(ws.plan), ws.model) is None


@pytest.mark.slow
def test_a_graph_in_half_precision(finished: tuple[Path, api.Report], tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    api.export(out, api.ExportSettings(precision="fp16"))
    api.rewrite(out)
    report = api.verify(out, replace(CHECKS, quality=False, device="cuda"))
    assert report.passed, report.checks


class Stops(Silent):
    """Fails at the fifth batch, in the second block."""

    @contextmanager
    def task(self, *_args: Any) -> Any:
        batches = iter(range(4))
        yield SimpleNamespace(advance=lambda _tokens: next(batches), part=lambda _number, _count: None)


def test_an_interrupted_calibration_goes_on(device: torch.device, tiny_folder: Path, tmp_path: Path) -> None:
    """States go to a file, and come back to the device."""
    model = on(device, tiny_folder, "bfloat16")
    assert device_of(model) == device
    rows = np.random.default_rng(0).integers(0, 256, (12, 256)).astype(np.int32)

    def collect(listener: Any) -> Moments:
        identity, partial = identity_of(model, rows, "one"), tmp_path / "partial"
        store = MomentsFolder(tmp_path / "moments", partial, {"identity": identity})
        how = {"known": store.has, "folder": partial, "identity": identity, "every_seconds": 0.0}
        for block, layer in moments_of(model, rows, listener=listener, **how):  # type: ignore[arg-type]
            store.put(block, layer)
        store.publish()
        return load_moments(tmp_path / "moments")[0]

    with pytest.raises(RuntimeError):
        collect(Stops())
    assert (tmp_path / "partial" / "states.001.0-of-1.safetensors").is_file()
    same_moments(collect(None), collect_moments(model, rows))
    assert hidden_size(model) == 32


@pytest.mark.slow
def test_an_encoder(device: torch.device, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "model"
    text_encoder(folder)
    report = api.run(
        folder,
        tmp_path / "out",
        api.SelectSettings(k=1, device="cuda"),
        replace(TEXT, calibration=(text,), samples=24, device="cuda"),
        replace(CHECKS, device="cuda"),
    )
    assert report.passed, report.checks


@pytest.mark.slow
def test_a_model_that_does_not_stay_on_the_device(
    device: torch.device, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without room gets a block at a time in every stage, and all that goes through it comes along."""
    monkeypatch.setattr(torch.get_device_module(device), "mem_get_info", lambda *_: (0, 1))
    selection = api.SelectSettings(k=1, criterion="kl", fit="weighted", repair=1, device="cuda")
    checks = replace(CHECKS, device="cuda")
    report = api.run(tiny_folder, tmp_path / "out", selection, replace(TEXT, device="cuda"), checks)
    assert report.passed, report.checks
