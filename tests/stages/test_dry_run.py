"""What a dry run says: what is kept by the stages' own keys, what is done and why; and that it writes nothing."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nbl_export import api, files
from nbl_export.errors import InputError
from nbl_export.models.folder import task_named
from nbl_export.models.source import find_model
from nbl_export.settings import RunSettings
from nbl_export.stages.in_order import DryRun
from nbl_export.stages.needs import (
    GIB,
    MIB,
    Sizes,
    check_disk,
    disk,
    lacks_memory,
    memory,
    sizes_of,
    sizes_of_source,
)
from nbl_export.workspace import Workspace
from tests.conftest import ROOT
from tests.finished import TWO, VERIFY
from tests.processes import Notes, nbl
from tests.tiny_types import tiny_model

Usage = namedtuple("Usage", "total used free")
ALL = ["calibrate", "select", "export", "rewrite", "verify"]
THREE = replace(TWO, k=3)


@pytest.fixture
def ahead(stories_folder: Path, stories_copy: Path, calibration: Any) -> Callable[..., DryRun]:
    """A dry run in a copy of the finished folder, of what that was asked for but for what is given."""

    def made(selection: api.SelectSettings = TWO, text: Any = calibration, **more: Any) -> DryRun:
        before = snapshot(stories_copy)
        found = api.dry_run(stories_folder, stories_copy, selection, text, VERIFY, **more)
        assert snapshot(stories_copy) == before
        return found

    return made


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything in ``folder``: a file that is written, or written anew, is another entry."""
    return {
        str(path.relative_to(folder)): (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for path in folder.rglob("*")
        for s in [path.lstat()]
    }


def whys(found: DryRun) -> dict[str, str | None]:
    assert all(bool(one.why) != one.kept for one in found.stages)
    return {one.stage: None if one.kept else one.why for one in found.stages}


def test_a_new_folder_is_not_made_and_no_weight_is_read(
    stories_folder: Path, tmp_path: Path, calibration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sha256_of", lambda *_: pytest.fail("a file was hashed"))
    monkeypatch.setattr("nbl_export.models.load.load_stored", lambda *_: pytest.fail("the model was loaded"))
    found = api.dry_run(stories_folder, tmp_path / "new" / "out", TWO, calibration, VERIFY)
    assert not list(tmp_path.iterdir())
    assert whys(found) == dict.fromkeys(ALL, "not done yet")
    assert all(one.memory for one in found.stages)


def test_another_k_keeps_calibration_and_export(
    ahead: Callable[..., DryRun], stories_copy: Path, stories_folder: Path, calibration: Any
) -> None:
    found = ahead(THREE)
    assert whys(found) == {
        "calibrate": None,
        "select": "it was made with another k",
        "export": None,
        "rewrite": "`select` is done again",
        "verify": "`select` is done again",
    }
    assert [row[0] for row in found.tables[0].rows if row[1] != "kept"] == ["select", "rewrite", "verify"]
    heard = Notes()
    api.run(stories_folder, stories_copy, THREE, calibration, VERIFY, heard)
    kept = [one.stage for one in found.stages if one.kept]
    assert heard.kept == kept
    assert whys(ahead(THREE)) == dict.fromkeys(ALL)


def test_what_each_setting_does_again(ahead: Callable[..., DryRun], calibration: Any) -> None:
    other_text = whys(ahead(text=replace(calibration, samples=16)))
    assert other_text["calibrate"] == "it was made with another samples" and other_text["export"] is None
    assert [other_text[name] for name in ("select", "rewrite", "verify")] == [
        "`calibrate` is done again",
        "`select` is done again",
        "`select` is done again",
    ]
    half = whys(ahead(exporting=api.ExportSettings("bf16")))
    assert half["select"] is None and half["export"] == "it was made with another precision"
    assert half["rewrite"] == half["verify"] == "`export` is done again"
    whole = whys(ahead(folder=api.FolderSettings("no")))
    assert whole["rewrite"] == "it was made with another whole" and whole["export"] is None


def test_a_budget_exports_before_it_selects(ahead: Callable[..., DryRun]) -> None:
    found = ahead(api.SelectSettings(budget=api.Budget(max_kl=1.0), criterion="cca"))
    assert [one.stage for one in found.stages] == ["calibrate", "export", "select", "rewrite", "verify"]
    assert [one.stage for one in found.stages if one.kept] == ["calibrate", "export"]


# refusals -----------------------------------------------------------------------------------------


def test_a_run_that_would_be_refused_is_refused(
    stories_folder: Path, tiny_folder: Path, stories_copy: Path, tmp_path: Path, calibration: Any
) -> None:
    before = snapshot(stories_copy)
    for refused, words in (
        (
            lambda: api.dry_run(stories_folder, stories_copy, api.SelectSettings(k=99), calibration),
            "--k is 99",
        ),
        (lambda: api.dry_run(tiny_folder, stories_copy, TWO, calibration), "belongs to another model"),
        (
            lambda: api.dry_run(stories_folder, stories_copy, TWO, api.CalibrateSettings(("no.txt",))),
            "not exist",
        ),
        (lambda: api.dry_run(stories_folder, stories_folder, TWO, calibration), "choose another --output"),
    ):
        with pytest.raises(InputError, match=words):
            refused()
    assert snapshot(stories_copy) == before


# dry run asked -------------------------------------------------------------------------------------


def test_a_dry_run_takes_what_a_run_takes() -> None:
    run, dry = (inspect.signature(one) for one in (api.run, api.dry_run))
    assert run.parameters == dry.parameters


@pytest.mark.parametrize("said", [["--json"], ["--k", "99"]])
def test_the_option_does_nothing_but_answer(tiny_folder: Path, tmp_path: Path, said: list[str]) -> None:
    done = nbl(tiny_folder, "--k", 2, "-o", tmp_path / "out", "--dry-run", *said, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    if "99" in said:
        assert done.code == 2 and "--k is 99; it must be between 0 and 4" in done.err
        return
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["command"] == "dry-run" and answer["problems"] == []
    assert len(answer["stages"]) == 5 and answer["stages"][0]["stage"] == "calibrate"
    assert all(one["kept"] is False and one["why"] for one in answer["stages"])


# needs ---------------------------------------------------------------------------------------------

TEXT = api.CalibrateSettings(("text",), samples=8, seq_len=640, selection_samples=2, heldout_samples=2)


def asked(text: api.CalibrateSettings = TEXT, precision: str = "bf16", **selection: Any) -> RunSettings:
    chosen = api.SelectSettings(**{"k": 12, "criterion": "kl", **selection})
    made = RunSettings(chosen, text, exporting=api.ExportSettings(precision))
    return made.resolve(task_named("text-generation"))


def taken(sizes: Sizes, stage: str, settings: RunSettings, width: int = 4) -> Any:
    return memory(sizes, settings, width, 64 * GIB)[stage]


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> Sizes:
    return sizes_of_source(find_model(str(stories_folder)))


def test_the_sizes_of_a_model_are_counted_by_hand(stories: Sizes) -> None:
    d, inner, layers, vocabulary, heads, kv = 64, 172, 5, 512, 8, 4
    block = 2 * d * d + 2 * d * (d // heads * kv) + 3 * d * inner + 2 * d
    assert stories == Sizes(
        weights=260_032,
        embedding=vocabulary * d,
        width=d,
        layers=layers,
        mlps=layers,
        block=block,
        head=vocabulary * d,
        largest=vocabulary * d,
        inner=inner,
        cache=2 * layers * kv * (d // heads),
        stored=4,
    )


def test_layers_that_lend_keys_cannot_go_and_borrowers_keep_none() -> None:
    for name in ("gemma3n_text", "gemma4_text"):
        sizes = sizes_of(tiny_model(name).to("meta"))
        # Layers 2 and 3 of 4 read the keys and values of layers 0 and 1.
        assert sizes.layers == 2 and sizes.cache == 2 * 2 * 8 * 2


# disk ---------------------------------------------------------------------------------------------


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 50, 0, int(size)))


def test_the_disk_that_is_computed_is_what_a_finished_run_has(
    stories: Sizes, stories_out: Path, calibration: Any
) -> None:
    ws = Workspace.open(stories_out)
    for stage, (leaves, _) in disk(stories, asked(calibration, "fp32", k=2, criterion="cca")).items():
        if stage in ("build", "verify"):
            continue
        record = ws.record(stage)
        assert record is not None
        small = ("config.json", "model.onnx", "tokenizer.json", "candidates.json", "rewrite.json")
        size = sum(p.stat().st_size for p in ws.paths(record) if p.name not in small)
        assert abs(leaves - size) < 0.1 * size, stage


def test_a_disk_without_room_is_refused(
    stories: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages come one after the other; what an interrupted calibration has left is there already."""
    ws, run = Workspace.create(tmp_path / "out"), asked(precision="fp16")
    room = disk(stories, run)
    (leaves, beside), (kept, while_working) = room["calibrate"], room["export"]
    assert while_working > 0 and beside > leaves
    for stages, needed in (
        (["calibrate"], leaves + beside),
        (["export"], kept + while_working),
        (["export", "calibrate"], kept + leaves + beside),
    ):
        free(monkeypatch, needed)
        check_disk(ws, stories, run, stages)
        free(monkeypatch, needed - 1)
        with pytest.raises(
            InputError, match=r"MiB free, and (this run|`\w+`) needs about .*: free some space"
        ):
            check_disk(ws, stories, run, stages)
    ws.partial_moments.mkdir(parents=True)
    (ws.partial_moments / "000.safetensors").write_bytes(b"x")
    check_disk(ws, stories, run, ["export", "calibrate"])


def test_a_run_and_a_stage_are_refused_before_any_work(
    stories_folder: Path, tmp_path: Path, calibration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    free(monkeypatch, 1000)
    with pytest.raises(InputError, match="this run needs about"):
        api.run(stories_folder, out, api.SelectSettings(k=2), calibration)
    assert not (out / "nbl" / "text.safetensors").exists()
    with pytest.raises(InputError, match="`calibrate` needs about"):
        api.calibrate(stories_folder, out, calibration)
    with monkeypatch.context() as patch:
        free(patch, GIB)
        api.calibrate(stories_folder, out, replace(calibration, samples=2))
    with pytest.raises(InputError, match="`export` needs about"):
        api.export(out)


# memory -------------------------------------------------------------------------------------------


def test_memory_that_is_not_there_is_a_sentence() -> None:
    found = {"the program": 3.0 * GIB, "weights": 1.0 * GIB, "logits": 2.0 * GIB}
    assert lacks_memory("select", found, 6 * GIB) == ""
    said = lacks_memory("select", found, 6 * GIB - 1)
    assert said.startswith(
        "`select` needs about 6.0 GiB of memory, most of it for logits, and 6.0 GiB are free"
    )


PAGE = ROOT / "docs" / "large-models.md"


def measured() -> list[tuple[str, str, float]]:
    """Shape, stage and anonymous MiB of each row that scripts/bench_scale.py wrote; one with an exit code is none."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w ]+) \| ([\d,]+) \| .*\|  \|$", PAGE.read_text(), re.M)
    return [(shape, stage, float(mib.replace(",", ""))) for shape, stage, mib in rows]


@pytest.fixture(scope="module")
def shapes() -> Iterator[dict[str, Sizes]]:
    """The sizes of each shape of scripts/bench_scale.py, from its configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        bench = importlib.import_module("bench_scale")
        yield {name: sizes_of(built(shape), 2) for name, shape in bench.SHAPES.items()}


def built(config: dict[str, Any]) -> Any:
    """A model without numbers."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    model.tie_weights()
    return model


@pytest.mark.parametrize(("shape", "stage", "mib"), measured())
def test_memory_is_within_half_as_much_of_what_was_measured(
    shapes: dict[str, Sizes], shape: str, stage: str, mib: float
) -> None:
    name, _, criterion = stage.partition(" ")
    found = taken(shapes[shape], name, asked(criterion=criterion or "cca"), 2)
    assert mib / 1.5 < sum(found.values()) / MIB < mib * 1.5
