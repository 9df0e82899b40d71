"""A calibrated and exported run to select from, and what is counted while that goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.calibrate.text import load_text
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.plan import Adapter, LinearLayer, load_plan
from nbl_export.linearize.swap import adapted
from nbl_export.progress import Silent
from nbl_export.stages.choosing import SpeedMeter
from nbl_export.workspace import Workspace
from tests.fixtures_graph import maps_in_place
from tests.processes import edit


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


# by hand --------------------------------------------------------------------------------------

QUICK = api.VerifySettings(quality=False, speed=False)


NONE: Mapping[str, Adapter] = {}


def forget(out: Path, *stages: str) -> None:
    edit(out / "nbl" / "workspace.json", lambda raw: [raw["stages"].pop(stage) for stage in stages])


def select(out: Path, settings: api.SelectSettings, listener: Silent | None = None) -> api.Plan:
    """The plan with its maps in memory: one that was read from its file reads what the file has now."""
    plan = api.select(out, settings, listener)
    return replace(
        plan, layers={i: LinearLayer(np.array(m.w), np.array(m.b)) for i, m in plan.layers.items()}
    )


def candidates(out: Path) -> Any:
    return json.loads((out / "nbl" / "candidates.json").read_text())


def files(out: Path) -> dict[str, bytes]:
    own = (".lock", "digests.json")
    return {
        p.name: p.read_bytes() for p in sorted((out / "nbl").iterdir()) if p.is_file() and p.name not in own
    }


def same_plan(a: api.Plan, b: api.Plan) -> bool:
    return a.chosen == b.chosen and all(
        np.array_equal(a.layers[i].w, b.layers[i].w) and np.array_equal(a.layers[i].b, b.layers[i].b)
        for i in a.chosen
    )


def kl_by_hand(
    out: Path, model: Any, layers: Mapping[int, LinearLayer], adapters: Mapping[str, Adapter] = NONE
) -> float:
    """Mean KL(original ‖ changed) of the selection text in float64, by whole runs with maps put in place by hand."""
    text = load_text(Workspace.open(out).text)
    ids = torch.from_numpy(text.selection.astype(np.int64))
    plan = replace(load_plan(Workspace.open(out).plan), layers=layers)
    with torch.inference_mode():
        log_p = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        with maps_in_place(model, plan), adapted(model, adapters):
            log_q = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def curve(out: Path) -> list[dict[str, Any]]:
    select(out, api.SelectSettings(k=5))
    points: list[dict[str, Any]] = candidates(out)["curve"]["points"]
    return points
