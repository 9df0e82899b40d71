"""`rewrite --onnx`: a graph that somebody else exported, into a new folder or in place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nbl_export.errors import BuildError, InputError
from nbl_export.linearize.plan import Plan, load_plan, save_plan
from nbl_export.rewrite import in_place
from nbl_export.rewrite import replace as rewrite_module
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.command_line import ENVIRONMENT, Done, assert_refused, nbl
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import random_plan, random_weights
from tests.graph.external_data import places
from tests.rewrite.foreign import (
    CONFIG,
    DATA,
    GENAI,
    TEXTS,
    WEIGHTS,
    C,
    Source,
    assert_rewritten,
    contents,
    exported,
    said,
)
from tests.sessions import cpu_session


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return exported(tmp_path)


# into a new folder -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "graph"])
def test_a_new_folder_runs_by_itself(source: Source, what: str) -> None:
    before = contents(source.folder)
    given = source.folder if what == "folder" else source.graph
    done = nbl("rewrite", "--onnx", given, "--plan", source.plan, "-o", source.out)
    assert done.code == 0, done
    assert contents(source.folder) == before
    shutil.rmtree(source.folder)
    assert set(contents(source.out)) == {"model.onnx", DATA, *TEXTS, "nbl/rewrite.json"}
    assert_rewritten(source.out / "model.onnx", source.plan)
    # The table and the last line say what was done.
    assert "KV pairs" in done.out and str(source.out / "model.onnx") in done.out.replace("\n", "")


def test_configurations_are_told(source: Source) -> None:
    rewrite_foreign(source.folder, source.plan, source.out)
    decoder = GENAI["model"]["decoder"]  # type: ignore[index]
    expected = {
        **GENAI,
        "model": {
            **GENAI["model"],  # type: ignore[dict-item]
            "decoder": {
                **decoder,
                "num_hidden_layers": 1,
                # Layer 1 is the one that is left, and its cache is number 0 now.
                "sliding_window": {"window_size": 8, "layers": [0]},
            },
        },
    }
    assert json.loads((source.out / "genai_config.json").read_text()) == expected
    told = {"linearized_layers": [0, 2], "kv_layers": [1]}
    assert json.loads((source.out / "config.json").read_text()) == {**CONFIG, "nbl_export": told}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (source.out / name).read_text() == TEXTS[name]


def test_the_summary_says_what_was_done(source: Source) -> None:
    result = rewrite_foreign(source.folder, source.plan, source.out)
    summary = said(source.out)
    assert summary["source"] == "model.onnx"
    assert summary["kv_layers"] == [1]
    assert summary["before"]["kv_pairs"] == 3 and summary["after"]["kv_pairs"] == 1
    assert summary["before"]["kv_bytes_per_token"] == 3 * 2 * 2 * 4 * 4
    assert summary["after"]["nodes"] == len(onnx.load(str(source.out / "model.onnx")).graph.node)
    assert [p["layer"] for p in summary["proofs"]] == [0, 1, 2]
    assert max(p["output_error"] for p in summary["proofs"]) < 1e-4
    assert [str(f) for f in result.files] == [str(source.out / "model.onnx"), str(source.out / DATA)]


def test_an_older_result_is_replaced(source: Source) -> None:
    rewrite_foreign(source.folder, source.plan, source.out)
    first = contents(source.out)
    (source.folder / "chat_template.jinja").unlink()
    save_plan(source.plan, random_plan(C, random_weights(C), (1,), "normed"))
    rewrite_foreign(source.folder, source.plan, source.out)
    assert_rewritten(source.out / "model.onnx", source.plan)
    # What only the older one had is gone, also its data.
    assert set(contents(source.out)) == set(first) - {"chat_template.jinja"}
    assert said(source.out)["kv_layers"] == [0, 2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_source_that_is_read_only(source: Source) -> None:
    source.folder.chmod(0o555)
    try:
        rewrite_foreign(source.folder, source.plan, source.out)
        assert_rewritten(source.out / "model.onnx", source.plan)
        done = nbl(*source.arguments("--in-place"))
        assert_refused(done, 2, "No permission", quietly=False)
    finally:
        source.folder.chmod(0o755)


def test_a_graph_without_external_data(source: Source) -> None:
    for name in ("model.onnx", DATA):
        (source.folder / name).unlink()
    source.graph.write_bytes(written(C, random_weights(C)).proto.SerializeToString())
    rewrite_foreign(source.folder, source.plan, source.out)
    assert_rewritten(source.out / "model.onnx", source.plan)
    rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert_rewritten(source.graph, source.plan)


# which graph -------------------------------------------------------------------------------------


def genai_names(folder: Path, name: object) -> None:
    config = json.loads(json.dumps(GENAI))
    config["model"]["decoder"]["filename"] = name
    (folder / "genai_config.json").write_text(json.dumps(config))


def test_the_usual_name_is_taken_of_several(source: Source) -> None:
    (source.folder / "genai_config.json").unlink()
    assert (source.folder / "encoder.onnx").exists()
    rewrite_foreign(source.folder, source.plan, source.out)
    assert_rewritten(source.out / "model.onnx", source.plan)


def test_the_configuration_names_the_graph(source: Source) -> None:
    source.graph.rename(source.folder / "decoder.onnx")
    (source.folder / "model.onnx").write_bytes(b"another graph")
    genai_names(source.folder, "decoder.onnx")
    rewrite_foreign(source.folder, source.plan, source.out)
    assert_rewritten(source.out / "decoder.onnx", source.plan)
    assert not (source.out / "model.onnx").exists()


def only_others(source: Source) -> None:
    (source.folder / "genai_config.json").unlink()
    source.graph.rename(source.folder / "decoder.onnx")


def no_graph(source: Source) -> None:
    (source.folder / "genai_config.json").unlink()
    for path in source.folder.glob("*.onnx"):
        path.unlink()


UNCLEAR: dict[str, tuple[Callable[[Source], object], str]] = {
    "several": (only_others, "decoder.onnx, encoder.onnx"),
    "none": (no_graph, "found: none"),
    "a name outside": (lambda s: genai_names(s.folder, "../model.onnx"), "outside its folder"),
    "an absolute name": (lambda s: genai_names(s.folder, str(s.graph)), "outside its folder"),
    "no such file": (lambda s: genai_names(s.folder, "absent.onnx"), "absent.onnx does not exist"),
    "no name": (lambda s: (s.folder / "genai_config.json").write_text('{"model": {}}'), "names no decoder"),
    "no JSON": (lambda s: (s.folder / "genai_config.json").write_text("{"), "damaged"),
    "no folder": (lambda s: shutil.rmtree(s.folder), "does not exist"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_which_graph_must_be_clear(source: Source, name: str) -> None:
    change, words = UNCLEAR[name]
    change(source)
    before = contents(source.folder)
    with pytest.raises(InputError, match=words):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert contents(source.folder) == before and not source.out.exists()


# options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give OUT alone, or --onnx"),
        (("OUT", "--plan", "PLAN"), "give OUT alone"),
        (("OUT", "--in-place"), "give OUT alone"),
        (("OUT", "--output", "NEW"), "give OUT alone"),
        (("--plan", "PLAN", "--in-place"), "give OUT alone"),
        (("--onnx", "SOURCE"), "--onnx needs --plan"),
        (("--onnx", "SOURCE", "--in-place"), "--onnx needs --plan"),
        (("OUT", "--onnx", "SOURCE", "--plan", "PLAN", "--in-place"), "no OUT"),
        (("--onnx", "SOURCE", "--plan", "PLAN"), "--output OUT for a new folder, or --in-place"),
        (("--onnx", "SOURCE", "--plan", "PLAN", "--output", "NEW", "--in-place"), "not both"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, tuple) else "",
)
def test_options_that_do_not_go_together(source: Source, arguments: tuple[str, ...], words: str) -> None:
    before = contents(source.folder.parent)
    named = {"SOURCE": source.folder, "PLAN": source.plan, "NEW": source.out, "OUT": source.folder}
    assert_refused(nbl("rewrite", *(named.get(a, a) for a in arguments)), 2, words)
    assert contents(source.folder.parent) == before


def a_file(source: Source) -> Path:
    source.out.write_text("a file")
    return source.out


def a_link_to_the_source(source: Source) -> Path:
    source.out.symlink_to(source.folder)
    return source.out


def an_output_folder(source: Source) -> Path:
    (source.out / "nbl").mkdir(parents=True)
    (source.out / "nbl" / "workspace.json").write_text("{}")
    return source.out


def a_users_files(*names: str) -> Callable[[Source], Path]:
    def make(source: Source) -> Path:
        for name in names:
            path = source.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("precious")
        return source.out

    return make


def with_one_more(source: Source) -> Path:
    rewrite_foreign(source.folder, source.plan, source.out)
    (source.out / "notes.txt").write_text("precious")
    return source.out


def rewritten_in_place(source: Source) -> Path:
    shutil.copytree(source.folder, source.out)
    rewrite_foreign(source.out, source.plan, None, in_place=True)
    return source.out


def a_record_of_others(source: Source) -> Path:
    source.out.mkdir()
    (source.out / "nbl").mkdir()
    (source.out / "nbl" / "rewrite.json").write_text('{"mine": true}')
    return source.out


def a_record_that_names_others(name: str) -> Callable[[Source], Path]:
    def make(source: Source) -> Path:
        rewrite_foreign(source.folder, source.plan, source.out)
        record = source.out / "nbl" / "rewrite.json"
        record.write_text(json.dumps({**said(source.out), "files": [name]}))
        return source.out

    return make


def a_link_for_the_record(source: Source) -> Path:
    (source.folder.parent / "elsewhere").mkdir()
    source.out.mkdir()
    (source.out / "nbl").symlink_to("../elsewhere")
    return source.out


def below_a_file(source: Source) -> Path:
    source.out.write_text("a file")
    return source.out / "deeper"


TARGETS: dict[str, tuple[Callable[[Source], Path], str]] = {
    "the source": (lambda s: s.folder, "is the folder of the graph itself"),
    "the source, spelled otherwise": (
        lambda s: s.folder / ".." / "source",
        "is the folder of the graph itself",
    ),
    "a link to the source": (a_link_to_the_source, "is the folder of the graph itself"),
    "a file": (a_file, "is a file"),
    "below a file": (below_a_file, "Not a directory"),
    "below the source": (lambda s: s.folder / "deep" / "out", "inside each other"),
    "above the source": (lambda s: s.folder.parent, "inside each other"),
    "a user's graph": (a_users_files("model.onnx", DATA), r"has files that no rewrite.*\(model.onnx, "),
    "a user's configuration": (a_users_files("config.json"), r"has files that no rewrite.*\(config.json\)"),
    "a user's files elsewhere": (a_users_files("a/b.txt", ".c", "d", "e"), r"\(.c, d, e and more\)"),
    "a user's file beside an older result": (with_one_more, r"\(notes.txt\)"),
    "what was rewritten in place": (rewritten_in_place, "has files that no rewrite"),
    "a record of others": (a_record_of_others, "record of the rewrite, .* is damaged"),
    "a record with a name outside": (
        a_record_that_names_others("../source/model.onnx"),
        "is not the name of a file",
    ),
    "a record with an absolute name": (
        a_record_that_names_others("/etc/passwd"),
        "is not the name of a file",
    ),
    "a link for the record": (a_link_for_the_record, "is a link or a file"),
    "an output folder of nbl-export": (an_output_folder, "is an output folder of nbl-export"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_folders_that_are_not_written_to(source: Source, name: str) -> None:
    make, words = TARGETS[name]
    target = make(source)
    before = contents(source.folder.parent)
    with pytest.raises(InputError, match=words):
        rewrite_foreign(source.folder, source.plan, target)
    assert contents(source.folder.parent) == before


def test_in_place_is_not_for_output_folders_of_nbl_export(source: Source) -> None:
    (source.folder / "nbl").mkdir()
    (source.folder / "nbl" / "workspace.json").write_text("{}")
    before = contents(source.folder)
    with pytest.raises(InputError, match="nbl-export rewrite"):
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert contents(source.folder) == before


# in place ----------------------------------------------------------------------------------------


def test_in_place_the_data_only_grows(source: Source) -> None:
    old, where = contents(source.folder), places(source.graph)
    done = nbl(*source.arguments("--in-place"))
    assert done.code == 0, done
    new = contents(source.folder)
    assert new[DATA].startswith(old[DATA]) and len(new[DATA]) > len(old[DATA])
    after = places(source.graph)
    kept = where.keys() & after.keys()
    assert {n: after[n] for n in kept} == {n: where[n] for n in kept} and "1.q" in kept
    assert min(after[n][1] for n in after.keys() - kept) >= len(old[DATA])
    assert set(new) == {*old, "nbl/rewrite.json"}
    assert_rewritten(source.graph, source.plan)
    assert json.loads(new["config.json"])["nbl_export"]["linearized_layers"] == [0, 2]
    assert json.loads(new["genai_config.json"])["model"]["decoder"]["num_hidden_layers"] == 1
    unchanged = {*WEIGHTS, "tokenizer.json", "chat_template.jinja"}
    assert {n: new[n] for n in unchanged} == {n: old[n] for n in unchanged}
    # A second time it says so, and changes nothing.
    done = nbl(*source.arguments("--in-place"))
    assert done.code == 0 and "done already, kept" in done.err and "KV pairs" in done.out, done
    assert contents(source.folder) == new
    # By another plan it is refused.
    save_plan(source.plan, random_plan(C, random_weights(C), (1,), "normed"))
    assert_refused(nbl(*source.arguments("--in-place")), 2, "already rewritten", quietly=False)
    assert contents(source.folder) == new


def test_another_graph_may_share_the_data(source: Source) -> None:
    other = source.folder / "other.onnx"
    shutil.copyfile(source.graph, other)
    feeds = {
        "input_ids": np.arange(6)[None],
        "attention_mask": np.ones((1, 6), np.int64),
        "position_ids": np.arange(6)[None],
        **{
            f"past_key_values.{i}.{s}": np.zeros((1, 2, 0, 4), np.float32)
            for i in range(3)
            for s in ("key", "value")
        },
    }

    def run() -> list[Any]:
        return cpu_session(other).run(None, feeds)  # type: ignore[no-any-return]

    before = run()
    rewrite_foreign(source.graph, source.plan, None, in_place=True)
    assert all(np.array_equal(a, b) for a, b in zip(before, run(), strict=True))
    assert_rewritten(source.graph, source.plan)


FAILURES = {
    "check": (rewrite_module, "check_like"),
    "count": (rewrite_module, "count"),
    "prove": (rewrite_module, "prove"),
}


@pytest.mark.parametrize(
    "error", [BuildError("refused here"), OSError(28, "No space"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_failure_leaves_everything(
    source: Source, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, in_place: bool
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    # What is made from the source is checked, when it is written; the source itself is not.
    monkeypatch.setattr(*FAILURES[step], (lambda _source: fail) if step == "check" else fail)
    before = contents(source.folder)
    with pytest.raises((BuildError, InputError, KeyboardInterrupt)):
        rewrite_foreign(source.folder, source.plan, None if in_place else source.out, in_place)
    assert contents(source.folder) == before
    assert not source.out.exists() or contents(source.out) == {}


BROKEN = {
    "config.json": "[1, 2]",
    "config.json ": "{",
    "genai_config.json": '{"model": {"decoder": 3}}',
    "genai_config.json ": '{"search": {}}',
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_configuration_that_cannot_be_told_leaves_everything(
    source: Source, name: str, in_place: bool
) -> None:
    (source.folder / name.strip()).write_text(BROKEN[name])
    before = contents(source.folder)
    with pytest.raises(InputError, match=r"config\.json"):
        rewrite_foreign(source.graph, source.plan, None if in_place else source.out, in_place)
    assert contents(source.folder) == before
    assert not source.out.exists() or contents(source.out) == {}


def test_an_interrupt_between_graph_and_configuration_can_be_repeated(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(in_place, "copy_sidecars", fail)
        rewrite_foreign(source.folder, source.plan, None, in_place=True)
    # The graph is done; what was missing is made up for.
    rewrite_foreign(source.folder, source.plan, None, in_place=True)
    assert json.loads((source.folder / "config.json").read_text())["nbl_export"]
    assert said(source.folder)["kv_layers"] == [1]


# no room, interrupts -----------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_no_room_leaves_everything(source: Source, in_place: bool) -> None:
    before = contents(source.folder)
    limit = len(before[DATA]) + 100 if in_place else len(before[DATA]) // 2
    done = nbl(*source.arguments(*(["--in-place"] if in_place else ["-o", source.out])), limit=limit)
    assert_refused(done, 2, "No room", quietly=False)
    assert contents(source.folder) == before
    assert not source.out.exists() or contents(source.out) == {}
    # With room the same command succeeds.
    done = nbl(*source.arguments(*(["--in-place"] if in_place else ["-o", source.out])))
    assert done.code == 0, done


INTERRUPTING = """
import os, signal, sys
from nbl_export import cli
from nbl_export.{room} import {module} as module

real = module.{name}

def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return real(*args, **options)

module.{name} = interrupted
cli.main()
"""


@pytest.mark.parametrize(
    "step",
    [
        "rewrite.replace.prove",
        "rewrite.replace.replace",
        "rewrite.replace.count",
        "graph.external_data._serialize",
    ],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_ctrl_c_leaves_everything(source: Source, step: str, in_place: bool) -> None:
    before = contents(source.folder)
    room, module, name = step.split(".")
    more = ["--in-place"] if in_place else ["-o", source.out]
    command = [sys.executable, "-c", INTERRUPTING.format(room=room, module=module, name=name)]
    command += [str(a) for a in source.arguments(*more)]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    done = Done(ran.returncode, ran.stdout, ran.stderr)
    assert_refused(done, 130, quietly=False)
    assert contents(source.folder) == before
    assert not source.out.exists() or contents(source.out) == {}


def test_a_link_out_of_the_source_is_not_copied(source: Source) -> None:
    """A downloaded folder must not hand on a file of its reader's."""
    secret = source.folder.parent / "secret.txt"
    secret.write_text("a secret")
    (source.folder / "notes.txt").symlink_to(secret)
    (source.folder / "tokenizer.json").unlink()
    (source.folder / "tokenizer.json").symlink_to("../secret.txt")
    with contextlib.suppress(InputError):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert not source.out.exists() or b"a secret" not in contents(source.out).values()


# the Hugging Face cache --------------------------------------------------------------------------


@pytest.fixture
def cached(source: Source) -> Source:
    """The same files as the Hub's cache has them: links into a folder of blobs, named by their hashes."""
    root = source.folder.parent / "models--owner--name"
    snapshot = root / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(source.folder.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return Source(snapshot, source.plan)


def test_from_the_cache_into_a_new_folder(cached: Source) -> None:
    out = cached.plan.parent / "out"
    before = contents(cached.folder.parent.parent)
    rewrite_foreign(cached.folder, cached.plan, out)
    assert contents(cached.folder.parent.parent) == before
    shutil.rmtree(cached.folder.parent.parent)
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert set(contents(out)) == {"model.onnx", DATA, *TEXTS, "nbl/rewrite.json"}
    assert_rewritten(out / "model.onnx", cached.plan)


def test_in_place_never_writes_into_the_blobs(cached: Source) -> None:
    """They belong to every revision that links to them."""
    blobs = cached.folder.parent.parent / "blobs"
    before = contents(cached.folder), contents(blobs)
    with pytest.raises(BuildError, match="is a link"):
        rewrite_foreign(cached.folder, cached.plan, None, in_place=True)
    assert (contents(cached.folder), contents(blobs)) == before


def test_the_api_and_the_command_need_no_torch(source: Source) -> None:
    code = (
        "import sys; from nbl_export import api; "
        f"api.rewrite_onnx({str(source.folder)!r}, {str(source.plan)!r}, {str(source.out)!r}); "
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_plan_that_linearizes_nothing_changes_no_number(source: Source) -> None:
    plan: Plan = load_plan(source.plan).without_layers()
    save_plan(source.plan, plan)
    rewrite_foreign(source.folder, source.plan, source.out)
    assert_rewritten(source.out / "model.onnx", source.plan)
    assert said(source.out)["kv_layers"] == [0, 1, 2]
