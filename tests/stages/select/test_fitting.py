"""The maps of the layers chosen: fitted in sequence, repaired, of a rank, and what they cost by hand."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.blocks import Mlp, as_json
from nbl_export.graph.io import load_graph
from nbl_export.progress import Silent
from nbl_export.settings.definition import AUTO
from nbl_export.workspace import Workspace
from tests.fixtures_graph import load
from tests.interruptions import Recorder, send
from tests.stages.select.by_hand import QUICK, candidates, kl_by_hand, same_plan, select


def test_what_the_final_maps_cost_is_measured(out: Path, stories_folder: Path) -> None:
    model = load(stories_folder)
    plan = select(out, api.SelectSettings(k=3, fit="sequential", repair=10))
    result = candidates(out)["result"]
    assert result["loss"]["kl"] == pytest.approx(kl_by_hand(out, model, plan.layers, plan.adapters), rel=5e-3)
    assert len(plan.adapters) == 3 * (5 - min(plan.chosen))  # gate, up and down of the blocks behind
    fitted = select(out, api.SelectSettings(k=3, fit="sequential"))
    assert result["before_repair"]["kl"] == pytest.approx(kl_by_hand(out, model, fitted.layers), rel=5e-3)
    assert not same_plan(plan, fitted)
    # The seed decides what the distillation reads.
    assert not same_plan(plan, select(out, api.SelectSettings(k=3, fit="sequential", repair=10, seed=1)))


def test_ridges_by_heldout_error_are_of_a_model_that_is_whole(out: Path) -> None:
    """The moments of other text are made before text goes through the model block by block; no file of them is left."""
    settings = api.SelectSettings(k=2, criterion="cca", ridge=None)
    before = set(Workspace.open(out).nbl.iterdir())
    plain, found = (select(out, replace(settings, fit=how)) for how in ("lmmse", "sequential"))
    first = min(plain.chosen)
    assert found.chosen == plain.chosen and not same_plan(found, plain)
    # Nothing before the first chosen layer is changed.
    scale = np.abs(plain.layers[first].w).max()
    np.testing.assert_allclose(found.layers[first].w, plain.layers[first].w, atol=1e-3 * scale)
    made = {path.name for path in set(Workspace.open(out).nbl.iterdir()) - before}
    assert made <= {"plan.json", "plan.safetensors", "candidates.json", "measured.json"}


class RepairStops(Silent):
    """Interrupts at the given step of a repair."""

    def __init__(self, at: int) -> None:
        self.recorder = Recorder(at, send(signal.SIGINT))

    def task(self, title: str, total: int, unit: str, done: int = 0) -> Any:
        return (self.recorder if title == "Repairing" else super()).task(title, total, unit, done)


def test_an_interrupted_repair_goes_on_and_its_checkpoint_is_gone_in_the_end(
    out: Path, calibrated: Path, tmp_path: Path
) -> None:
    settings = api.SelectSettings(k=2, repair=6)
    expected = select(Path(shutil.copytree(calibrated, tmp_path / "whole")), settings)
    checkpoint = Workspace.open(out).repair_checkpoint
    with pytest.raises(KeyboardInterrupt):
        select(out, settings, RepairStops(4))
    assert checkpoint.exists() and Workspace.open(out).record("select") is None
    going_on = RepairStops(-1)
    assert same_plan(select(out, settings, going_on), expected)
    assert going_on.recorder.start == (6, 4)
    assert not checkpoint.exists()


def test_a_rank_is_found_for_each_map(both_out: Path, stories_folder: Path) -> None:
    """Attention of this model writes into few directions, its MLPs into all; of a rank, W is two products."""
    chosen = (0, 1, 4, Mlp(1))
    whole = select(both_out, api.SelectSettings(layers=chosen))
    plan = select(both_out, api.SelectSettings(layers=chosen, rank=AUTO))  # type: ignore[arg-type]
    result = candidates(both_out)["result"]
    assert plan.rank is None and set(plan.ranks) == {0, 1, 4}
    assert result["ranks"] == {str(i): rank for i, rank in plan.ranks.items()}
    nmse = {c["layer"]: c["nmse"] for c in candidates(both_out)["candidates"]}
    for index, layer in plan.layers.items():
        rank = plan.rank_of(index)
        assert np.linalg.matrix_rank(layer.w) == (rank or np.linalg.matrix_rank(whole.layers[index].w))
        assert result["rank_lost"][str(index)] <= 0.02 * nmse[as_json(index)] * 1.001
    for name, maps in (("before_rank", whole.layers), ("loss", plan.layers)):
        by_hand = kl_by_hand(both_out, load(stories_folder), maps)
        assert result[name]["kl"] == pytest.approx(by_hand, rel=5e-3)
    api.rewrite(both_out)
    report = api.verify(both_out, QUICK)
    assert report.passed, report.checks
    weights = {n: v.shape for n, v in load_graph(both_out / "model.onnx").graph.initializers.items()}
    for index in plan.chosen:
        assert (f"layers.{index}.nbl_linear.down_weight" in weights) == (index in plan.ranks)
    assert f"in {len(plan.ranks)} of 4 layers" in (both_out / "report" / "report.md").read_text()
