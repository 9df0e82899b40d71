"""`rewrite --onnx`: a graph that somebody else exported, into a folder; nothing of the user's is overwritten."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.errors import BuildError, InputError
from nbl_export.linearize.plan import load_plan, save_plan
from nbl_export.rewrite import replace as rewrite_module
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.end_to_end.oracle import assert_computes, random_plan
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import Choices, random_weights
from tests.processes import assert_refused, killed_at_change, nbl

C = Choices(layers=3, width=16, heads=4, qkv_bias=True, o_bias="Add")
LAYERS = (0, 2)
DATA = "weights.data"
GENAI = {
    "model": {
        "type": "llama",
        "vocab_size": 24,
        "decoder": {
            "filename": "model.onnx",
            "num_hidden_layers": 3,
            "sliding_window": {"window_size": 8, "layers": [1, 2]},
            "head_size": 4,
        },
    },
    "search": {"max_length": 32},
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3}
TEXTS = {
    "genai_config.json": json.dumps(GENAI),
    "config.json": json.dumps(CONFIG),
    "tokenizer.json": '{"version": "1.0"}',
    "chat_template.jinja": "{{ messages }}",
}
# Weights of others; what is rewritten does not need them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "encoder.onnx", "encoder.onnx.data", ".hidden")


@dataclass(frozen=True)
class Source:
    """A folder with a decoder whose weights are in an external file, and a plan for it elsewhere."""

    folder: Path
    plan: Path

    @property
    def graph(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def out(self) -> Path:
        return self.folder.parent / "out"

    def arguments(self, *more: object) -> tuple[object, ...]:
        return ("rewrite", "--onnx", self.folder, "--plan", self.plan, *more)


def export(folder: Path, c: Choices = C, name: str = "model.onnx", data: str = DATA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        written(c, random_weights(c)).proto,
        str(folder / name),
        save_as_external_data=True,
        location=data,
        size_threshold=200,
    )
    return folder / name


def exported(folder: Path) -> Source:
    """The decoder with configurations, tokenizer, and other weights beside it, in ``folder`` / "source"."""
    graph = export(folder / "source")
    for name, text in TEXTS.items():
        (graph.parent / name).write_text(text)
    for name in WEIGHTS:
        (graph.parent / name).write_bytes(b"weights of something else")
    plan = folder / "plan" / "plan.json"
    plan.parent.mkdir()
    save_plan(plan, random_plan(C, random_weights(C), LAYERS, "normed"))
    return Source(graph.parent, plan)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_rewritten(path: Path, plan: Path) -> None:
    assert_computes(path, C, random_weights(C), load_plan(plan))


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "nbl" / "rewrite.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return exported(tmp_path)


def test_a_new_folder_runs_by_itself_and_its_configurations_are_told(source: Source) -> None:
    before = contents(source.folder)
    done = nbl("rewrite", "--onnx", source.folder, "--plan", source.plan, "-o", source.out)
    assert done.code == 0, done
    assert contents(source.folder) == before
    shutil.rmtree(source.folder)
    assert set(contents(source.out)) == {"model.onnx", DATA, *TEXTS, "nbl/rewrite.json"}
    assert_rewritten(source.out / "model.onnx", source.plan)
    # The table and the last line say what was done.
    assert "KV pairs" in done.out and str(source.out / "model.onnx") in done.out.replace("\n", "")
    decoder = json.loads((source.out / "genai_config.json").read_text())["model"]["decoder"]
    # Layer 1 is the one that is left, and its cache is number 0 now.
    assert decoder == {
        **GENAI["model"]["decoder"],  # type: ignore[index]
        "num_hidden_layers": 1,
        "sliding_window": {"window_size": 8, "layers": [0]},
    }
    told = {"linearized_layers": [0, 2], "kv_layers": [1]}
    assert json.loads((source.out / "config.json").read_text()) == {**CONFIG, "nbl_export": told}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (source.out / name).read_text() == TEXTS[name]


# which graph -------------------------------------------------------------------------------------


def genai_names(folder: Path, name: object) -> None:
    config = json.loads(json.dumps(GENAI))
    config["model"]["decoder"]["filename"] = name
    (folder / "genai_config.json").write_text(json.dumps(config))


def only_others(source: Source) -> None:
    (source.folder / "genai_config.json").unlink()
    source.graph.rename(source.folder / "decoder.onnx")


UNCLEAR: dict[str, tuple[Callable[[Source], object], str]] = {
    "several": (only_others, "decoder.onnx, encoder.onnx"),
    "a name outside": (lambda s: genai_names(s.folder, "../model.onnx"), "outside its folder"),
    "no such file": (lambda s: genai_names(s.folder, "absent.onnx"), "absent.onnx does not exist"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_which_graph_must_be_clear(source: Source, name: str) -> None:
    change, words = UNCLEAR[name]
    change(source)
    before = contents(source.folder)
    with pytest.raises(InputError, match=words):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert contents(source.folder) == before and not source.out.exists()


# which folder ------------------------------------------------------------------------------------


def holds(**files: str) -> Callable[[Source], Path]:
    """``files`` by their names, in which __ is a slash and _ a dot."""

    def make(source: Source) -> Path:
        for name, text in files.items():
            path = source.out / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source.out

    return make


def with_one_more(source: Source) -> Path:
    rewrite_foreign(source.folder, source.plan, source.out)
    (source.out / "notes.txt").write_text("precious")
    return source.out


def a_record_that_names_others(source: Source) -> Path:
    rewrite_foreign(source.folder, source.plan, source.out)
    record = source.out / "nbl" / "rewrite.json"
    record.write_text(json.dumps({**said(source.out), "files": ["../source/model.onnx"]}))
    return source.out


TARGETS: dict[str, tuple[Callable[[Source], Path], str]] = {
    "the source": (lambda s: s.folder / ".." / "source", "inside each other"),
    "below the source": (lambda s: s.folder / "deep" / "out", "inside each other"),
    "a user's graph": (holds(model_onnx="precious"), r"has files that no rewrite.*\(model.onnx\)"),
    "a user's file beside an older result": (with_one_more, r"\(notes.txt\)"),
    "a record of others": (holds(nbl__rewrite_json='{"mine": true}'), "record of the rewrite, .* is damaged"),
    "a record with a name outside": (a_record_that_names_others, "is not the name of a file"),
    "an output folder of nbl-export": (holds(nbl__workspace_json="{}"), r"\(nbl/workspace.json\)"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_folders_that_are_not_written_to(source: Source, name: str) -> None:
    make, words = TARGETS[name]
    target = make(source)
    before = contents(source.folder.parent)
    with pytest.raises(InputError, match=words):
        rewrite_foreign(source.folder, source.plan, target)
    assert contents(source.folder.parent) == before


def test_two_at_a_time_are_refused_and_leftovers_of_killed_processes_go(source: Source) -> None:
    root, victim = source.out, source.folder.parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    for folder in (root, root / "nbl"):
        (folder / ".onnx.x.nbl.tmp").mkdir(parents=True)
        (folder / ".onnx.x.nbl.tmp" / "weights").write_text("a full copy")
        (folder / ".z.nbl.tmp").symlink_to(victim)
    with (root / "nbl" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = contents(root)
        with pytest.raises(InputError, match=rf"Another nbl-export is writing to {root}: wait"):
            rewrite_foreign(source.folder, source.plan, root)
        assert contents(root) == before
    rewrite_foreign(source.folder, source.plan, root)
    assert set(contents(root)) == {"model.onnx", DATA, *TEXTS, "nbl/rewrite.json"}
    assert (victim / "file").read_text() == "precious"


# failures, kills ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_everything(
    source: Source, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(rewrite_module, "count", fail)
    before = contents(source.folder)
    with pytest.raises((BuildError, InputError, KeyboardInterrupt)):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert contents(source.folder) == before and not source.out.exists()


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


@pytest.mark.slow
def test_a_kill_at_any_change_is_harmless(
    undisturbed: tuple[Source, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """The next run ends as if there had been none."""
    source, before, expected = undisturbed
    number, killed, out = 0, True, tmp_path / "out"
    while killed:
        shutil.copytree(before, out)
        killed = killed_at_change(
            number, out, lambda: rewrite_foreign(source.folder, source.plan, out) and None
        )
        if (out / "model.onnx").exists():  # the older one or the newer one, with its own data
            names = ("model.onnx", DATA)
            here = [(out / name).read_bytes() for name in names]
            assert here in [[files[name] for name in names] for files in (contents(before), expected)]
        rewrite_foreign(source.folder, source.plan, out)
        assert contents(out) == expected
        shutil.rmtree(out)
        number += 4
    assert number > 40


def test_a_link_out_of_the_source_is_not_copied(source: Source) -> None:
    """A downloaded folder must not hand on a file of its reader's."""
    (source.folder.parent / "secret.txt").write_text("a secret")
    (source.folder / "tokenizer.json").unlink()
    (source.folder / "tokenizer.json").symlink_to("../secret.txt")
    with pytest.raises(InputError, match="tokenizer"):
        rewrite_foreign(source.folder, source.plan, source.out)
    assert not source.out.exists()


def test_from_the_hugging_face_cache(source: Source) -> None:
    """It has links into a folder of blobs, named by their hashes."""
    root = source.folder.parent / "models--owner--name"
    snapshot = root / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(source.folder.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    out, before = source.plan.parent / "out", contents(root)
    rewrite_foreign(snapshot, source.plan, out)
    assert contents(root) == before
    shutil.rmtree(root)
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert set(contents(out)) == {"model.onnx", DATA, *TEXTS, "nbl/rewrite.json"}
    assert_rewritten(out / "model.onnx", source.plan)


Change = Callable[[onnx.ModelProto], object]
make = helper.make_node


def refusal(source: Source, change: Change) -> str:
    """The sentence of `rewrite --onnx` for a changed graph; nothing has changed."""
    proto = onnx.load(str(source.graph))
    change(proto)
    source.graph.write_bytes(proto.SerializeToString())
    before = contents(source.folder.parent)
    done = nbl(*source.arguments("--output", source.out))
    assert contents(source.folder.parent) == before
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code in (2, 4) and len(errors) == 1 and done.err.rstrip().endswith(errors[0]), done
    assert "Internal error" not in done.err and "Traceback" not in done.err
    assert len(errors[0]) < 1000 and errors[0].isprintable(), errors[0]
    return errors[0]


def escape_in_a_name(proto: onnx.ModelProto) -> None:
    next(n for n in proto.graph.node if n.op_type == "Add").input[1] = "a\nerror: all is well\x1b[2J"


def fails_at_run_time(proto: onnx.ModelProto) -> None:
    """Fewer positions than the probe has tokens."""
    (tensor,) = [t for t in proto.graph.initializer if t.name == "positions"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:3], "positions"))


def no_attention(proto: onnx.ModelProto) -> None:
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    embed = [t for t in proto.graph.initializer if t.name == "embed"]
    node = make("Gather", ["embed", "input_ids"], ["logits"])
    proto.graph.CopyFrom(helper.make_graph([node], "g", [tokens], [logits], embed))


def merged(proto: onnx.ModelProto) -> None:
    """All layers lie in the branches of an If."""
    graph = proto.graph
    branch = helper.make_graph(list(graph.node), "branch", [], list(graph.output), list(graph.initializer))
    names = [v.name for v in graph.output]
    del graph.node[:], graph.initializer[:]
    graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    graph.node.append(make("If", ["flag"], names, then_branch=branch, else_branch=branch))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.metadata_props.add(key="nbl_export.kv_layers", value="[0, 1"),
            "was not written by nbl-export",
        ),
        (escape_in_a_name, "ONNX"),
        (fails_at_run_time, "onnxruntime does not run the graph"),
        (no_attention, "No attention was found"),
        (merged, "merged decoder"),
    ],
)
def test_what_is_no_decoder(source: Source, change: Change, words: str) -> None:
    assert words in refusal(source, change)


def test_options_that_do_not_go_together(source: Source) -> None:
    before = contents(source.folder.parent)
    assert_refused(nbl("rewrite", "--onnx", source.folder, "--plan", source.plan), 2, "and --output")
    assert contents(source.folder.parent) == before


def test_the_api_needs_no_torch(source: Source) -> None:
    code = (
        "import sys; from nbl_export import api; "
        f"api.rewrite_onnx({str(source.folder)!r}, {str(source.plan)!r}, {str(source.out)!r}); "
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
