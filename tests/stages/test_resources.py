"""What a run would take: from configuration and headers alone, and what does not fit said with what would."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from nbl_export import api, digests
from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.models.load import load_model, load_skeleton
from nbl_export.models.source import find_model
from nbl_export.stages import machine, resources
from nbl_export.stages.machine import Rates
from nbl_export.stages.needs import GIB, Need, sizes_of
from nbl_export.stages.resources import Machine, model_sizes
from nbl_export.stages.room import Room
from tests.encoders import text_encoder, vision_encoder


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "rates", lambda *_: Rates(1e12, 1e11, 1e9, 2e9))


class Memory(NamedTuple):
    available: int


def with_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(size))


def stages(table: Any) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_no_weight_is_read_and_nothing_is_written(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(stories_folder, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    save_file(broken, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is NaN or infinite"):
        load_model(find_model(str(model)))

    def read(*_: Any) -> str:
        pytest.fail("a file was hashed")

    monkeypatch.setattr(digests, "sha256_of", read)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    (table,) = api.plan_resources(model, tmp_path / "out", api.SelectSettings(k=2))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert list(stages(table)) == ["calibrate", "select", "export", "rewrite", "verify"]
    (same,) = api.plan_resources(stories_folder, tmp_path / "out", api.SelectSettings(k=2))
    assert stages(same) == stages(table)


@pytest.mark.parametrize("kind", ["decoder", "text", "images"])
def test_sizes_of_a_model_without_bytes_are_those_of_the_model(
    stories_folder: Path, tmp_path: Path, kind: str
) -> None:
    made = {"decoder": lambda _: stories_folder, "text": text_encoder, "images": vision_encoder}
    source = find_model(str(made[kind](tmp_path / "model")))
    skeleton = load_skeleton(source)
    assert {t.device.type for t in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    found, file = model_sizes(source)
    real = sizes_of(load_model(source), 4, found.file)
    assert found == real and file == Path(source.path) / "model.safetensors"
    assert (found.shape.row_tokens is not None) == (kind == "images")
    assert found.file == file.stat().st_size > 4 * found.blocks


def test_without_a_number_of_layers_half_of_them_are_meant(stories_folder: Path, tmp_path: Path) -> None:
    (some,) = api.plan_resources(stories_folder, tmp_path / "out")
    (half,) = api.plan_resources(stories_folder, tmp_path / "out", api.SelectSettings(k=3))
    assert stages(some) == stages(half)
    for asked, refused in {
        api.SelectSettings(k=-1): "--k is -1",
        api.SelectSettings(k=6): r"--k is 6; it must be between 0 and 5",
        api.SelectSettings(layers=(1, 5)): r"--layers names layer 5; the model has layers 0 to 4\.",
        api.SelectSettings(k=2, rank=64): "--rank",
    }.items():
        with pytest.raises(InputError, match=refused):
            api.plan_resources(stories_folder, tmp_path / "out", asked)


def test_k_counts_what_may_become_linear(stories_folder: Path, tmp_path: Path) -> None:
    def need(selection: api.SelectSettings, blocks: Any) -> Any:
        return api.plan_resources(
            stories_folder, tmp_path / "out", selection, api.CalibrateSettings(blocks=blocks)
        )

    need(api.SelectSettings(k=10), "both")
    need(api.SelectSettings(layers=(3, Mlp(4), Span(0, 1))), "all")
    for selection, blocks, words in (
        (api.SelectSettings(k=11), "both", r"between 0 and 10 \(the model's attention layers and MLPs\)"),
        (api.SelectSettings(layers=(Mlp(4),)), "attention", "there are no moments of MLPs"),
    ):
        with pytest.raises(InputError, match=words):
            need(selection, blocks)


# what does not fit --------------------------------------------------------------------------------


def test_memory_that_is_not_there_is_said_with_what_would_fit(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, 100 * GIB)
    (table,) = api.plan_resources(stories_folder, tmp_path / "out", api.SelectSettings(k=2))
    assert not table.problems
    text = api.CalibrateSettings(selection_samples=100_000)
    (table,) = api.plan_resources(stories_folder, tmp_path / "out", api.SelectSettings(k=2), text)
    assert not table.problems
    with_memory(monkeypatch, 10 * GIB)
    (table,) = api.plan_resources(stories_folder, tmp_path / "out", api.SelectSettings(k=2), text)
    (sentence,) = table.problems
    assert sentence.startswith("`select` needs about ") and "and 10.0 GiB are free" in sentence
    assert sentence.endswith(
        "most of it for the original's predictions, and 10.0 GiB are free: with --criterion cca it would fit."
    )
    with_memory(monkeypatch, GIB // 10)
    (table,) = api.plan_resources(stories_folder, tmp_path / "out", api.SelectSettings(k=2))
    assert len(table.problems) == 5 and all("use a machine with more memory" in s for s in table.problems)


def test_a_disk_that_is_too_small_is_said(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(3 << 20))
    (table,) = api.plan_resources(stories_folder, tmp_path / "new" / "out", api.SelectSettings(k=2))
    assert table.problems[-1].startswith(f"{tmp_path} has 3 MiB free, and this run needs about ")


# time ---------------------------------------------------------------------------------------------


def test_time_is_that_of_operations_and_of_bytes() -> None:
    need = Need(Room("select", 0), 0, ({"a": 0.0},), fast=7e12, exact=7e11, read=3e9)
    seconds = Machine(100 * GIB, Rates(1e12, 1e11, 1e9, 2e9)).seconds(need, 10**9)
    # 10 s of each precision at 0.7 of the rate; 1 GB from the disk, and 2 GB that are in memory by then.
    assert seconds == pytest.approx(resources._STARTS + 20 + 1 + 0.5)
    widened = Machine(100 * GIB, Rates(1e12, 1e11, 1e9, 2e9)).seconds(replace(need, widened=4e9), 10**9)
    assert widened == pytest.approx(seconds + 2)
    small = Machine(GIB, Rates(1e12, 1e11, 1e9, 2e9)).seconds(need, 10**9)
    assert small == pytest.approx(resources._STARTS + 20 + 3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")]
)
def test_time_in_words(seconds: float, text: str) -> None:
    assert resources.in_words(seconds) == text
