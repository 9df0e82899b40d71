"""What stages write: the estimates against the files of finished runs, and refusals that say what would fit."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.settings import RunSettings
from nbl_export.stages.room import Room, Shape, check_room, check_run, needed, room_to_calibrate, rooms
from nbl_export.workspace import Workspace

# Llama-3.1-8B.
BIG = Shape(weights=8_030_261_248, embedding=128_256 * 4096, width=4096, layers=32)
Usage = namedtuple("Usage", "total used free")


def asked(precision: str = "fp32", **selection: Any) -> RunSettings:
    made = RunSettings(api.SelectSettings(**({"k": 12} | selection)), exporting=api.ExportSettings(precision))
    return made.resolve(task_named("text-generation"))


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 50, 0, int(size)))


def test_what_is_estimated_is_what_a_finished_run_has(
    stories_out: Path, stories_folder: Path, calibration: Any
) -> None:
    shape = Shape.of(load_model(find_model(str(stories_folder))))
    assert (shape.weights, shape.width, shape.layers) == (260_032, 64, 5)
    settings = RunSettings(api.SelectSettings(k=2), calibration).resolve(task_named("text-generation"))
    ws = Workspace.open(stories_out)
    for room in rooms(shape, settings):
        record = ws.record(room.stage)
        assert record is not None
        small = ("config.json", "model.onnx", "tokenizer.json", "candidates.json", "measured.json")
        size = sum(p.stat().st_size for p in ws.paths(record) if p.name not in small)
        assert abs(room.leaves - size) < 0.1 * size, room.stage


@pytest.mark.parametrize("blocks", ["both", "all"])
def test_moments_of_mlps_and_spans_are_counted(
    stories_folder: Path, calibration: Any, tmp_path: Path, blocks: Any
) -> None:
    both = replace(calibration, blocks=blocks)
    shape = Shape.of(load_model(find_model(str(stories_folder))))
    api.calibrate(stories_folder, tmp_path / "out", both)
    ws = Workspace.open(tmp_path / "out")
    record = ws.record("calibrate")
    assert record is not None
    size = sum(path.stat().st_size for path in ws.paths(record))
    assert abs(room_to_calibrate(shape, both).leaves - size) < 0.1 * size
    assert room_to_calibrate(shape, both).leaves > 1.5 * room_to_calibrate(shape, calibration).leaves


def test_the_stages_come_one_after_the_other() -> None:
    found = [Room("calibrate", 10, 5), Room("export", 20), Room("rewrite", 3, 1)]
    assert needed(found) == 34
    assert needed(found, {"calibrate": 10}) == 24
    assert needed([Room("calibrate", 10, 50), Room("export", 20)]) == 60


@pytest.mark.parametrize(("precision", "gib"), [("fp32", 30), ("bf16", 15), ("fp16", 15)])
def test_the_weights_are_most_of_it(precision: str, gib: int) -> None:
    export = next(r for r in rooms(BIG, asked(precision)) if r.stage == "export")
    assert round(export.leaves / 2**30) == gib


def test_a_run_that_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = Workspace.create(tmp_path / "out")
    free(monkeypatch, needed(rooms(BIG, asked("bf16"))) + 1)
    check_run(ws, BIG, asked("bf16"))
    with pytest.raises(
        InputError, match=r"GiB free, and this run needs about [\d.]+ GiB: .*--precision bf16"
    ):
        check_run(ws, BIG, asked("fp32"))
    free(monkeypatch, 2**30)
    with pytest.raises(InputError, match=r"choose another --output\.$"):
        check_run(ws, BIG, asked("fp32"))


def test_what_is_kept_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps its calibration and its graph needs the room of the plan and of the rewrite alone."""
    ws = Workspace.create(tmp_path / "out")
    found = {room.stage: room for room in rooms(BIG, asked("fp32"))}
    left = needed([found["select"], found["rewrite"]])
    free(monkeypatch, left)
    check_run(ws, BIG, asked("fp32"), {"calibrate", "export"})
    free(monkeypatch, left - 1)
    with pytest.raises(InputError, match="MiB free, and this run needs about"):
        check_run(ws, BIG, asked("fp32"), {"calibrate", "export"})


def test_a_workload_is_weighed_with_a_graph_too() -> None:
    order = [room.stage for room in rooms(BIG, asked("bf16", workload=("prefill=8",)))]
    assert order == ["calibrate", "export", "select", "rewrite"]


def test_a_budget_is_weighed_with_a_graph_before_there_is_a_plan() -> None:
    found = rooms(BIG, asked("bf16", k=None, budget=api.Budget(min_speedup=1.2)))
    assert [room.stage for room in found] == ["calibrate", "export", "select", "rewrite"]
    plain = next(r for r in rooms(BIG, asked("bf16")) if r.stage == "select")
    # Half of the layers are assumed; all other weights the timed graph reads from the unmodified one.
    assert next(r for r in found if r.stage == "select").beside == 4 * 16 * (4096 + 1) * 4096
    assert not plain.beside


def test_engines_and_images_count(tmp_path: Path) -> None:
    with_engines = replace(asked("fp16"), engines=api.EngineSettings())
    assert rooms(BIG, with_engines)[-1].stage == "build"
    images = replace(BIG, row_bytes=3 * 224 * 224 * 4, row_tokens=197)
    assert rooms(images, asked())[0].leaves > rooms(BIG, asked())[0].leaves


def test_what_is_there_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = Workspace.create(tmp_path / "out")
    ws.partial_moments.mkdir(parents=True)
    (ws.partial_moments / "000.safetensors").write_bytes(b"x" * 1000)
    free(monkeypatch, 500)
    with pytest.raises(InputError, match="`calibrate` needs about"):
        check_room(ws, [Room("calibrate", 1200)])
    check_room(ws, [Room("calibrate", 1200)], have={"calibrate": 1000})


def test_a_run_is_refused_before_any_work(
    stories_folder: Path, tmp_path: Path, calibration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(InputError, match="this run needs about"):
        api.run(stories_folder, tmp_path / "out", api.SelectSettings(k=2), calibration)
    assert not (tmp_path / "out" / "nbl" / "text.safetensors").exists()


@pytest.mark.parametrize("stage", ["calibrate", "export"])
def test_a_single_stage_counts_itself(
    stories_folder: Path, tmp_path: Path, calibration: Any, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    out = tmp_path / "out"
    if stage == "export":
        api.calibrate(stories_folder, out, replace(calibration, samples=2))
    free(monkeypatch, 1000)
    with pytest.raises(InputError, match=f"`{stage}` needs about"):
        if stage == "export":
            api.export(out)
        else:
            api.calibrate(stories_folder, out, calibration)
