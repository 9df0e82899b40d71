"""What a dry run says: what is kept by the stages' own keys, what is done and why; and that it writes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nbl_export import api, digests
from nbl_export.errors import InputError
from nbl_export.stages.dry_run import DryRun
from tests.finished import TWO, VERIFY, state
from tests.listening import Notes

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
    monkeypatch.setattr(digests, "sha256_of", lambda *_: pytest.fail("a file was hashed"))
    monkeypatch.setattr("nbl_export.models.load.load_stored", lambda *_: pytest.fail("the model was loaded"))
    found = api.dry_run(stories_folder, tmp_path / "new" / "out", TWO, calibration, VERIFY)
    assert not list(tmp_path.iterdir())
    assert whys(found) == dict.fromkeys(ALL, "not done yet")
    assert all(one.memory for one in found.stages)


def test_the_files_that_would_be_written_are_those_of_the_run(
    stories_folder: Path, stories_out: Path, tmp_path: Path, calibration: Any
) -> None:
    """But for configurations and tokenizers beside graphs, and plots."""
    found = api.dry_run(stories_folder, tmp_path / "out", TWO, calibration, VERIFY)
    recorded = state(stories_out)
    for one in found.stages:
        folders = tuple(name for name in one.files if name.endswith("/"))
        real = {name for name in recorded[one.stage]["files"] if not (folders and name.startswith(folders))}
        named = set(one.files) - set(folders)
        assert named <= real, one.stage
        assert all(
            any(name.startswith(folder) for name in recorded[one.stage]["files"]) for folder in folders
        )
        left = {Path(name).name for name in real - named if not name.startswith("report/plots/")}
        allowed = ("config.json", "generation_config.json", "genai_config.json", "text.json")
        assert all(name in allowed or "token" in name or name.endswith(".jinja") for name in left), left


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
    assert [row[0] for row in found.tables[1].rows] == ["select", "rewrite", "verify"]
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


class Usage(NamedTuple):
    free: int


def test_a_disk_without_room_refuses_what_is_still_to_do(
    ahead: Callable[..., DryRun],
    stories_folder: Path,
    tmp_path: Path,
    calibration: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the run would, before its first minute; a run that keeps its calibration and export needs little."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 20))
    with pytest.raises(InputError, match="has 1 MiB free, and this run needs about"):
        api.dry_run(stories_folder, tmp_path / "new", TWO, calibration, VERIFY)
    assert whys(ahead(THREE))["calibrate"] is None
