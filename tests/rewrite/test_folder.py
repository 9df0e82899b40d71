"""The folder that a foreign graph is rewritten into: nothing of the user's is overwritten, and a kill is harmless."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.linearize.plan import save_plan
from nbl_export.rewrite.folder import opened
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.end_to_end.random_decoders import random_plan, random_weights
from tests.exhaustive import ALL
from tests.interruptions import killed_at_change
from tests.rewrite.foreign import C, Source, assert_rewritten, contents, exported, said


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return exported(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path, dict[str, bytes]]:
    """A source, an older result of another plan, and what its folder holds after the newer one."""
    source = exported(tmp_path_factory.mktemp("undisturbed"))
    older = source.folder.parent / "older"
    plan = source.plan.read_bytes(), source.plan.with_suffix(".safetensors").read_bytes()
    save_plan(source.plan, random_plan(C, random_weights(C), (1,), "normed"))
    (source.folder / "special_tokens_map.json").write_text("{}")
    rewrite_foreign(source.folder, source.plan, older)
    (source.folder / "special_tokens_map.json").unlink()
    source.plan.write_bytes(plan[0])
    source.plan.with_suffix(".safetensors").write_bytes(plan[1])
    rewrite_foreign(source.folder, source.plan, source.out)
    return source, older, contents(source.out)


def assert_kill_is_harmless(
    case: tuple[Source, Path, dict[str, bytes]], number: int, out: Path, older: bool
) -> bool:
    """Whether there was a change ``number`` to be killed at; the next run ends as if there had been none."""
    source, before, expected = case
    if older:
        shutil.copytree(before, out)

    def work() -> None:
        rewrite_foreign(source.folder, source.plan, out)

    killed = killed_at_change(number, out, work)
    if (out / "model.onnx").exists():
        # It is the older one or the newer one, with its own data.
        same = [contents(before), expected]
        assert any(
            all((out / n).read_bytes() == files[n] for n in ("model.onnx", "weights.data")) for files in same
        )
    work()
    assert contents(out) == expected
    return killed


@pytest.mark.parametrize("number", [3, 40, 82, 90, 93])
@pytest.mark.parametrize("older", [False, True])
def test_a_kill_is_harmless(
    undisturbed: tuple[Source, Path, dict[str, bytes]], number: int, older: bool, tmp_path: Path
) -> None:
    assert assert_kill_is_harmless(undisturbed, number, tmp_path / "out", older)


@pytest.mark.slow
def test_a_kill_at_any_change_is_harmless(
    undisturbed: tuple[Source, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    for number in count(step=1 if ALL else 4):
        if not assert_kill_is_harmless(undisturbed, number, tmp_path / str(number), older=True):
            break
        shutil.rmtree(tmp_path / str(number))
    assert number > 80


@pytest.mark.parametrize("in_place", [True, False])
def test_two_at_a_time_are_refused(source: Source, in_place: bool) -> None:
    root = source.folder if in_place else source.out
    (root / "nbl").mkdir(parents=True)
    with (root / "nbl" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(root)
        with pytest.raises(InputError, match=rf"Another nbl-export is writing to {root}: wait"):
            rewrite_foreign(source.folder, source.plan, None if in_place else root, in_place)
        assert contents(root) == before
    rewrite_foreign(source.folder, source.plan, None if in_place else root, in_place)
    assert set(contents(root / "nbl")) == {"rewrite.json"}


def test_leftovers_of_killed_processes_are_deleted_and_links_are_not_followed(
    source: Source, tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    for folder in (source.folder, source.folder / "nbl", source.out, source.out / "nbl"):
        folder.mkdir(exist_ok=True)
        (folder / ".onnx.x.nbl.tmp").mkdir()
        (folder / ".onnx.x.nbl.tmp" / "weights").write_text("a full copy")
        (folder / ".model.onnx.y.nbl.tmp").write_text("half a graph")
        (folder / ".z.nbl.tmp").symlink_to(tmp_path / "victim")
    rewrite_foreign(source.folder, source.plan, source.out)
    rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert not [name for name in contents(tmp_path) if ".nbl.tmp" in name]
    assert (tmp_path / "victim" / "file").read_text() == "precious"


@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_lock_that_is_no_file_is_refused(source: Source, what: str) -> None:
    (source.out / "nbl").mkdir(parents=True)
    lock = source.out / "nbl" / ".lock"
    if what == "link":
        lock.symlink_to(source.graph)
    else:
        os.mkfifo(lock)
    before = contents(source.folder)
    with pytest.raises(InputError, match="is not a regular file: delete it"):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert contents(source.folder) == before


def test_a_refused_folder_is_not_left_behind(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), opened(out):
        raise RuntimeError
    assert not out.exists()


def test_the_record_names_what_was_written(source: Source) -> None:
    rewrite_foreign(source.folder, source.plan, source.out)
    assert set(said(source.out)["files"]) == set(contents(source.out)) - {"nbl/rewrite.json"}


def test_a_record_of_an_older_release_protects_what_is_there(source: Source) -> None:
    """It does not say which files are its own."""
    rewrite_foreign(source.folder, source.plan, source.out)
    old = {k: v for k, v in said(source.out).items() if k not in ("files", "plan_sha256", "graph_sha256")}
    (source.out / "nbl" / "rewrite.json").write_text(json.dumps(old))
    before = contents(source.out)
    with pytest.raises(InputError, match="has files that no rewrite of nbl-export has written"):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert contents(source.out) == before
    # In place the graph itself says that it is rewritten.
    with pytest.raises(InputError, match="already rewritten"):
        rewrite_foreign(source.out, source.plan, None, in_place=True)
    assert_rewritten(source.out / "model.onnx", source.plan)
