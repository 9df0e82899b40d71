"""A rewrite in place: a kill at any moment is harmless, and no file but its own is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import save_plan
from nbl_export.rewrite import in_place
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import random_plan, random_weights
from tests.exhaustive import ALL
from tests.interruptions import killed_at_change
from tests.listening import Notes
from tests.rewrite.foreign import DATA, C, Source, assert_rewritten, contents, exported, said


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return exported(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, dict[str, bytes]]:
    """A source, and what its folder holds when a copy of it was rewritten in place."""
    source = exported(tmp_path_factory.mktemp("undisturbed"))
    done = source.folder.parent / "done"
    shutil.copytree(source.folder, done)
    rewrite_foreign(done, source.plan, None, in_place=True)
    return source, contents(done)


# kills -------------------------------------------------------------------------------------------


def assert_kill_is_harmless(source: Source, expected: dict[str, bytes], number: int, folder: Path) -> bool:
    """Whether there was a change ``number`` to be killed at; the run after it is killed too, and the next is not."""
    shutil.copytree(source.folder, folder)

    def work() -> None:
        rewrite_foreign(folder, source.plan, None, in_place=True)

    killed = killed_at_change(number, folder, work)
    load_graph(folder / "model.onnx")  # the old one or the new one, with all its weights
    killed_at_change(number // 2, folder, work)
    load_graph(folder / "model.onnx")
    work()
    assert contents(folder) == expected
    return killed


# Before the record of the old length, while appending, before the graph is accepted, before and after its rename,
# before the last configuration, and before the lock is let go.
@pytest.mark.parametrize("number", [4, 12, 22, 28, 29, 45, 57])
def test_a_kill_is_harmless(
    undisturbed: tuple[Source, dict[str, bytes]], number: int, tmp_path: Path
) -> None:
    assert assert_kill_is_harmless(*undisturbed, number, tmp_path / "source")


@pytest.mark.slow
def test_a_kill_at_any_change_is_harmless(
    undisturbed: tuple[Source, dict[str, bytes]], tmp_path: Path
) -> None:
    for number in count(step=1 if ALL else 4):
        if not assert_kill_is_harmless(*undisturbed, number, tmp_path / str(number)):
            break
        shutil.rmtree(tmp_path / str(number))
    assert number > 50


def test_a_graph_without_external_data_survives_a_kill_too(source: Source, tmp_path: Path) -> None:
    (source.folder / DATA).unlink()
    source.graph.write_bytes(written(C, random_weights(C)).proto.SerializeToString())
    results = []
    for number in (1000, 12, 17, 25):
        folder = tmp_path / str(number)
        shutil.copytree(source.folder, folder)

        def work(folder: Path = folder) -> None:
            rewrite_foreign(folder, source.plan, None, in_place=True)

        killed = killed_at_change(number, folder, work)
        assert killed == (number < 1000)
        work()
        results.append(contents(folder))
    assert all(result == results[0] for result in results)


def half_done(source: Source, number: int) -> None:
    """Leave a rewrite that was killed at its change ``number``."""
    assert killed_at_change(
        number, source.folder, lambda: rewrite_foreign(source.folder, source.plan, None, in_place=True)
    )
    assert (source.folder / "nbl" / "rewrite.pending.json").exists()


APPENDED, COMMITTED = 19, 30


def test_a_kill_after_the_commit_is_finished_and_another_plan_is_then_refused(source: Source) -> None:
    half_done(source, COMMITTED)
    save_plan(source.plan, random_plan(C, random_weights(C), (1,), "normed"))
    with pytest.raises(InputError, match="already rewritten"):
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert said(source.folder)["kv_layers"] == [1]
    assert json.loads((source.folder / "config.json").read_text())["nbl_export"]["kv_layers"] == [1]


def test_a_kill_before_the_commit_leaves_another_plan_free(source: Source) -> None:
    half_done(source, APPENDED)
    save_plan(source.plan, random_plan(C, random_weights(C), (1,), "normed"))
    rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert_rewritten(source.graph, source.plan)


def test_a_graph_that_was_exported_again_is_rewritten_and_its_data_is_not_cut(source: Source) -> None:
    half_done(source, APPENDED)
    model = onnx.load(str(source.graph))
    model.doc_string = "exported again"
    (source.folder / DATA).unlink()
    onnx.save_model(model, str(source.graph), save_as_external_data=True, location=DATA, size_threshold=200)
    with (source.folder / DATA).open("ab") as file:
        file.write(b"more" * 10_000)
    size = (source.folder / DATA).stat().st_size
    rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert_rewritten(source.graph, source.plan)
    assert (source.folder / DATA).read_bytes()[:size].endswith(b"more" * 10_000)


def test_the_second_time_is_kept(source: Source) -> None:
    first = rewrite_foreign(source.folder, source.plan, None, in_place=True)
    before, listener = contents(source.folder), Notes()
    second = rewrite_foreign(source.folder, source.plan, None, True, listener)
    assert contents(source.folder) == before and listener.kept == ["rewrite"]
    assert (second.before, second.after, second.files) == (first.before, first.after, first.files)
    assert {n: p.errors for n, p in second.proofs.items()} == {n: p.errors for n, p in first.proofs.items()}


# a record that somebody else may have written ----------------------------------------------------------


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda raw: {**raw, **fields}


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut the tokenizer": changed(data="tokenizer.json", length=0),
    "delete the tokenizer": changed(data="tokenizer.json", length=None),
    "cut the data": changed(length=100),
    "delete the data": changed(length=None),
    "cut a file outside": changed(data="../plan/plan.json", length=0),
    "an absolute name": changed(data="/etc/passwd", length=0),
    "another graph": changed(graph="../source/model.onnx"),
    "a link": changed(data="link", length=0),
    "a negative length": changed(length=-5),
    "no number": changed(length="many"),
    "no object": lambda _raw: [1],
    "a field too many": changed(more=1),
    "no field": lambda _raw: {"graph": "model.onnx"},
    "files": changed(files=["model.onnx"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_changes_nothing(source: Source, name: str) -> None:
    half_done(source, APPENDED)
    (source.folder / "link").symlink_to("../plan/plan.json")
    pending = source.folder / "nbl" / "rewrite.pending.json"
    pending.write_text(json.dumps(HOSTILE[name](json.loads(pending.read_text()))))
    before = contents(source.folder.parent)
    with pytest.raises(InputError):
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    after = contents(source.folder.parent)
    ours = {"source/nbl/.lock"} | {n for n in before if n.endswith(".nbl.tmp")}
    assert {n: v for n, v in after.items() if n not in ours} == {
        n: v for n, v in before.items() if n not in ours
    }


# files that are not its own ----------------------------------------------------------------------------


def test_a_hard_link_is_refused_before_any_work(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    other = source.folder.parent / "other.data"
    os.link(source.folder / DATA, other)
    monkeypatch.setattr("nbl_export.rewrite.replace.prove", lambda *_: pytest.fail("was proven"))
    before = contents(source.folder.parent)
    with pytest.raises(BuildError, match=r"weights\.data is a hard link, .*: copy the folder with `cp -r`"):
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert contents(source.folder.parent) == before


def test_weights_where_the_record_goes_are_refused(source: Source) -> None:
    model = onnx.load(str(source.graph))
    (source.folder / "nbl").mkdir()
    onnx.save_model(
        model, str(source.graph), save_as_external_data=True, location="nbl/rewrite.json", size_threshold=200
    )
    before = contents(source.folder)
    with pytest.raises(InputError, match=r"rewrite\.json"):
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert contents(source.folder) == before
    # Into another folder it goes.
    rewrite_foreign(source.folder, source.plan, source.out)
    assert_rewritten(source.out / "model.onnx", source.plan)
    assert said(source.out)["source"] == "model.onnx"


def test_weights_below_the_folder_do_not_name_a_file_that_is_written_to(source: Source) -> None:
    """The data is in sub/config.json; beside the graph there is another config.json."""
    model = onnx.load(str(source.graph))
    (source.folder / "sub").mkdir()
    onnx.save_model(
        model, str(source.graph), save_as_external_data=True, location="sub/config.json", size_threshold=200
    )
    data, config = ((source.folder / name).read_bytes() for name in ("sub/config.json", "config.json"))
    rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert_rewritten(source.graph, source.plan)
    assert (source.folder / "sub" / "config.json").read_bytes() == data
    assert (source.folder / "config.json").read_bytes() == config
    assert (source.folder / "model.onnx.data").exists()


def test_data_of_another_graph_is_not_appended_to(source: Source) -> None:
    (source.folder / DATA).unlink()
    source.graph.write_bytes(written(C, random_weights(C)).proto.SerializeToString())
    (source.folder / "model.onnx.data").write_bytes(b"of another graph")
    before = contents(source.folder)
    with pytest.raises(InputError, match=r"does not belong to model\.onnx: move it away"):
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert contents(source.folder) == before


def test_an_error_after_the_record_undoes_everything(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = contents(source.folder)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No room"):
        patch.setattr(in_place, "append_graph", fail)
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert contents(source.folder) == before
