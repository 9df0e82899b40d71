"""The output folder: what counts as done, who may work in it, and refusals in words."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.records import MODEL as MODEL_READ
from nbl_export.records import SIDECARS, STAGES, StageRecord, key_of
from nbl_export.workspace import Workspace
from tests.processes import edit, files_in

MODEL = {"source": "some/model", "kind": "hub", "fingerprint": "a" * 64, "model": "m" * 64}
ASKED, READ = {"samples": 3}, {"model": "m" * 64}
KEY = key_of("calibrate", ASKED, READ)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An output folder with a model and one finished stage of two files."""
    work = Workspace.create(tmp_path / "out")
    with work.lock():
        work.set_model(MODEL)
    work.probe.write_bytes(b"moments" * 100)
    work.model.write_bytes(b"graph" * 100)
    work.finish("calibrate", ASKED, READ, [work.probe, work.model], 1.23456, ["a note"])
    return work


def edit_state(work: Workspace, **changes: Any) -> None:
    edit(work.state_path, lambda state: state.update(changes))


# what is done ------------------------------------------------------------------------------------


def test_a_finished_stage_is_done_also_for_the_next_process(workspace: Workspace) -> None:
    again = Workspace.open(workspace.root)
    assert again.undone("calibrate", ASKED, READ) is None
    assert again.undone("calibrate", {"samples": 4}, READ) == "it was made with another samples"
    assert again.undone("calibrate", {**ASKED, "seed": None}, READ) == "it was made with another seed"
    assert again.undone("select", ASKED, READ) == ""
    record = again.record("calibrate")
    assert record is not None
    assert (record.key, record.settings, record.seconds) == (KEY, ASKED, 1.235)
    assert record.notes == ("a note",)
    assert record.files == {
        "nbl/probe.safetensors": hashlib.sha256(b"moments" * 100).hexdigest(),
        "model.onnx": hashlib.sha256(b"graph" * 100).hexdigest(),
    }
    assert again.model_info == MODEL


def edited(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [edited, truncated, Path.unlink, replaced_by_a_folder])
def test_a_damaged_file_undoes_its_stage(workspace: Workspace, damage: Any) -> None:
    damage(workspace.model)
    again = Workspace.open(workspace.root)
    assert again.undone("calibrate", ASKED, READ) == "model.onnx is missing or was changed"
    record = again.record("calibrate")
    assert record is not None
    assert again.damaged_file(record) == "model.onnx"
    with pytest.raises(InputError) as caught:
        again.require("calibrate")
    message = str(caught.value)
    assert str(workspace.model) in message
    assert f"run `nbl-export calibrate MODEL -o {workspace.root}` again" in message


def test_a_stage_that_is_not_done_names_the_command_to_run(workspace: Workspace) -> None:
    out = workspace.root
    for stage, command in {"select": f"select {out} --k K", "export": f"export {out}"}.items():
        for asked in (workspace.require, workspace.finished):
            with pytest.raises(InputError) as caught:
                asked(stage)
            assert str(caught.value) == (
                f"{out} has no finished `{stage}` yet: run `nbl-export {command}` first."
            )
    assert workspace.require("calibrate") == workspace.finished("calibrate")
    assert workspace.require("calibrate").key == KEY


# the model of the folder -------------------------------------------------------------------------


def test_another_model_is_refused_and_not_recorded(workspace: Workspace) -> None:
    again = Workspace.open(workspace.root)
    with pytest.raises(InputError) as caught:
        again.set_model({"source": "other/model", "kind": "hub", "fingerprint": "b" * 64})
    for part in ("some/model", "other/model", "a" * 12, "b" * 12, "--output"):
        assert part in str(caught.value)
    assert Workspace.open(workspace.root).model_info == MODEL


# the lock ----------------------------------------------------------------------------------------


def test_a_second_process_is_kept_out(workspace: Workspace) -> None:
    program = (
        "import sys; from pathlib import Path; from nbl_export.workspace import Workspace\n"
        "try:\n"
        "    with Workspace.open(Path(sys.argv[1])).lock(): print('in')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )

    def other() -> str:
        command = [sys.executable, "-c", program, str(workspace.root)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with workspace.lock():
        assert other() == "InputError"
    assert other() == "in"


def test_what_a_killed_process_left_is_removed_under_the_lock(workspace: Workspace) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from nbl_export.files import atomic_path\n"
        "from nbl_export.workspace import Workspace\n"
        "work = Workspace.open(Path(sys.argv[1]))\n"
        "with work.lock(), atomic_path(work.probe) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = files_in(workspace.root)
    done = subprocess.run([sys.executable, "-c", program, str(workspace.root)], check=False)
    assert done.returncode == -9
    assert len(files_in(workspace.root) - before) == 1  # the half-written file
    assert workspace.undone("calibrate", ASKED, READ) is None  # the kill cost nothing that was finished
    with Workspace.open(workspace.root).lock():
        assert files_in(workspace.root) == before


# damaged and foreign folders ---------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_record_of_another_version_is_refused(workspace: Workspace, version: Any) -> None:
    edit_state(workspace, version=version)
    with pytest.raises(
        InputError, match=r"workspace\.json is not a record of this nbl-export: use another --output\.$"
    ):
        Workspace.open(workspace.root)


def test_a_damaged_stage_record_is_refused(workspace: Workspace) -> None:
    for record in ("done", {"key": "k", "unknown": 1}):
        edit_state(workspace, stages={"calibrate": record})
        with pytest.raises(
            InputError, match=r"record of this .* is damaged .*: delete .* and start again\.$"
        ):
            Workspace.open(workspace.root)


def test_open_refuses_what_is_no_output_folder(tmp_path: Path) -> None:
    command = r"start with `nbl-export calibrate MODEL -o .*`\.$"
    with pytest.raises(InputError, match=r"is not an output folder .*" + command):
        Workspace.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not an output folder of nbl-export .*" + command):
        Workspace.open(tmp_path)


def test_what_another_process_finished_before_the_lock_is_not_lost(tmp_path: Path) -> None:
    info = {"source": "m", "fingerprint": "f"}
    first = Workspace.create(tmp_path)
    first.set_model(info)
    late = Workspace.create(tmp_path)  # opened before the first one finishes its stage
    with first.lock():
        (tmp_path / "nbl" / "a").write_text("a")
        first.finish("calibrate", {}, {}, [tmp_path / "nbl" / "a"], 1.0, [])
        with pytest.raises(InputError, match="Another nbl-export is running"), late.lock():
            pass
    with late.lock():
        late.set_model({**info, "path": "elsewhere"})
        (tmp_path / "nbl" / "b").write_text("b")
        late.finish("select", {}, {}, [tmp_path / "nbl" / "b"], 1.0, [])
    after = Workspace.open(tmp_path)
    assert after.undone("calibrate", {}, {}) is None
    assert after.undone("select", {}, {}) is None


# a folder that somebody else made ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["../victim", "nbl/../../victim", "/tmp/victim", "out", "", "a\0b"])
def test_a_recorded_name_that_leaves_the_folder_is_refused_and_nothing_is_deleted(
    workspace: Workspace, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    (workspace.root / "out").symlink_to(victim)
    named = {name: "0" * 64}
    edit(workspace.state_path, lambda state: state["stages"]["calibrate"].update(files=named))
    with pytest.raises(InputError, match="not the name of a file in"):
        Workspace.open(workspace.root)
    assert victim.read_text() == "somebody's"


# nothing stale -----------------------------------------------------------------------------------


@pytest.fixture
def chain(workspace: Workspace) -> Workspace:
    """calibrate → select → rewrite, as the stages record it."""
    for name, above in (("select", "calibrate"), ("rewrite", "select")):
        record = workspace.record(above)
        assert record is not None
        workspace.finish(name, {}, {above: record.result}, [workspace.model], 0.0, [])
    return workspace


@pytest.mark.parametrize(
    ("settings", "content"), [({"samples": 4}, b"moments" * 100), (ASKED, b"others!" * 100)]
)
def test_a_stage_done_again_makes_stale_whatever_was_made_of_it(
    chain: Workspace, settings: dict[str, int], content: bytes
) -> None:
    """With other settings, or with another result of the same ones."""
    chain.probe.write_bytes(content)
    chain.finish("calibrate", settings, READ, [chain.probe, chain.model], 0.0, [])
    assert chain.stale("calibrate") is None
    assert chain.stale("select") == "`calibrate` was done again"
    assert chain.stale("rewrite") == "of `select`, `calibrate` was done again"
    assert chain.current("rewrite") is None
    with pytest.raises(
        InputError, match=r"`rewrite` in .* is out of date \(of `select`, .*run `nbl-export rewrite .*` again"
    ):
        chain.require("rewrite")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 0}, "another version of nbl-export"),
        ({"version": 9}, "another version of nbl-export"),
        ({"settings": {"samples": 4}}, "its record was changed"),
        ({"key": "0" * 64}, "its record was changed"),
        ({"made_of": {}}, "its record was changed"),
    ],
)
def test_a_record_that_is_not_of_this_version_or_was_changed_is_stale(
    chain: Workspace, change: dict[str, Any], words: str
) -> None:
    edit(chain.state_path, lambda state: state["stages"]["calibrate"].update(change))
    assert words in str(Workspace.open(chain.root).stale("calibrate"))
    assert Workspace.open(chain.root).current("rewrite") is None


# stage record --------------------------------------------------------------------------------------


def record(stage: str, settings: dict[str, int], made_of: dict[str, str], content: str = "x") -> StageRecord:
    key = key_of(stage, settings, made_of)
    return StageRecord(key, settings, {"file": content}, 1.0, (), made_of, STAGES[stage])


def test_the_key_is_of_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        key_of("select", {"k": 2}, {"calibrate": "a"}),
        key_of("export", {"k": 2}, {"calibrate": "a"}),
        key_of("select", {"k": 3}, {"calibrate": "a"}),
        key_of("select", {"k": 2}, {"calibrate": "b"}),
        key_of("select", {"k": 2}, {"calibrate": "a", "export": "c"}),
    }
    monkeypatch.setitem(STAGES, "select", STAGES["select"] + 1)
    assert len({*keys, key_of("select", {"k": 2}, {"calibrate": "a"})}) == 6


def test_a_tuple_and_the_list_that_json_makes_of_it_are_one_setting() -> None:
    assert key_of("select", {"layers": (1, 2)}, {}) == key_of("select", {"layers": [1, 2]}, {})


def test_the_result_is_of_the_key_and_of_the_files() -> None:
    one = record("calibrate", {}, {})
    results = {one.result, record("calibrate", {"a": 1}, {}).result, record("calibrate", {}, {}, "y").result}
    assert len(results) == 3
    # How long it took and what it said is no part of it.
    assert replace(one, seconds=2.0, notes=("a",)).result == one.result


@pytest.mark.parametrize(
    ("settings", "made_of", "words"),
    [
        ({"k": 3}, {MODEL_READ: "m"}, "it was made with another k"),
        ({"k": 2, "rank": 4}, {MODEL_READ: "m"}, "it was made with another rank"),
        ({"k": 2}, {MODEL_READ: "n"}, "the model's tokenizer, code or other files have changed"),
        (
            {"k": 2},
            {MODEL_READ: "m", SIDECARS: "s"},
            "the model's generation configuration or chat template has changed",
        ),
        ({"k": 2}, {MODEL_READ: "m", "export": "e"}, "`export` was done again"),
        ({"k": 2}, {MODEL_READ: "m", "text": "t"}, "its text changed"),
        ({"k": 2}, {MODEL_READ: "m"}, None),
    ],
)
def test_which_input_is_another_is_said(
    settings: dict[str, int], made_of: dict[str, str], words: str | None
) -> None:
    assert record("select", {"k": 2}, {MODEL_READ: "m"}).other_inputs("select", settings, made_of) == words


def test_a_record_that_names_a_stage_which_is_not_there(workspace: Workspace) -> None:
    """An empty result, which no stage has, is no way around it."""
    workspace.finish("select", {}, {"export": ""}, [], 0.0, [])
    assert workspace.stale("select") == "`export` was done again"
