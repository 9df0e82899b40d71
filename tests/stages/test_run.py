"""One invocation: a stage is done once, its notes are kept, and what fails leaves no record."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.models.source import find_model
from nbl_export.progress import Listener
from nbl_export.stage_record import key_of
from nbl_export.stages.run import Run
from nbl_export.workspace import Workspace
from tests.listening import Notes


def working(run: Run, text: str, ran: list[str]) -> Any:
    """Work that writes one file and says so."""

    def work(listener: Listener) -> list[Path]:
        ran.append(text)
        with listener.task("Writing", 2, "steps") as task:
            task.advance(2)
        listener.note(f"wrote {text}")
        run.workspace.probe.write_text(text)
        return [run.workspace.probe]

    return work


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_stage_is_done_once_by_key_also_in_the_next_invocation(tiny_folder: Path, out: Path) -> None:
    listener, ran = Notes(), []  # type: ignore[var-annotated]
    run = Run.start(find_model(str(tiny_folder)), out, listener)
    run.stage("calibrate", {"a": 1}, {}, working(run, "one", ran))
    run.stage("calibrate", {"a": 1}, {}, working(run, "never", ran))
    assert listener.notes == ["wrote one", "calibrate: done already, kept."] and listener.kept == [
        "calibrate"
    ]
    assert listener.tasks == [("Writing", 2, "steps", 0)] and listener.advanced == [2]
    again = Run.resume(out)
    again.stage("calibrate", {"a": 1}, {}, working(again, "never", ran))
    again.stage("calibrate", {"a": 2}, {}, working(again, "two", ran))
    assert ran == ["one", "two"]
    record = Workspace.open(out).record("calibrate")
    assert record is not None
    assert (record.settings, record.notes) == ({"a": 2}, ("wrote two",))
    assert list(record.files) == ["nbl/probe.safetensors"] and record.seconds >= 0
    # What is not the file that was written is made again.
    again.workspace.probe.write_text("changed by hand")
    last = Run.resume(out)
    last.stage("calibrate", {"a": 2}, {}, working(last, "three", ran))
    assert ran == ["one", "two", "three"] and last.workspace.probe.read_text() == "three"


@pytest.mark.parametrize(
    ("raised", "told", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "in stage `export`"),
        (ValueError("a slip"), ValueError, "a slip"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["the disk is full", "a slip", "Ctrl-C"],
)
def test_a_stage_that_fails_is_not_done(
    tiny_folder: Path, out: Path, raised: BaseException, told: type[BaseException], message: str | None
) -> None:
    run = Run.start(find_model(str(tiny_folder)), out)

    def work(_listener: Listener) -> list[Path]:
        raise raised

    with pytest.raises(told, match=message):
        run.stage("export", {}, {}, work)
    assert Workspace.open(out).record("export") is None
    ran: list[str] = []
    run.stage("export", {}, {}, working(run, "now", ran))
    assert ran == ["now"] and Workspace.open(out).is_done("export", key_of("export", {}, {}))


def test_going_on_finds_the_model_of_the_folder(tiny_folder: Path, out: Path) -> None:
    started = Run.start(find_model(str(tiny_folder)), out)
    resumed = Run.resume(out)
    assert resumed.model.source == started.model.source == find_model(str(tiny_folder))
    state = json.loads((out / "nbl" / "workspace.json").read_text())
    (out / "nbl" / "workspace.json").write_text(json.dumps({**state, "model": None}))
    with pytest.raises(
        InputError, match=rf"records no model: start with `nbl-export calibrate MODEL -o {out}`"
    ):
        Run.resume(out)
