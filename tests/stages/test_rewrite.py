"""The stages that export, rewrite and build: what they begin from, what they record, damage, and interrupts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import AutoConfig, AutoTokenizer

from nbl_export import api
from nbl_export.engine.library import find_gpu
from nbl_export.errors import InputError
from nbl_export.graph.io import external_files, load_graph
from nbl_export.linearize.plan import load_plan, save_plan
from nbl_export.models.folder import task_named
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.stages.export import export, not_given
from nbl_export.stages.rewrite import rewrite
from nbl_export.stages.run import current_rewrite, opened
from nbl_export.workspace import Workspace
from tests.families import Calibrated
from tests.finished import QUICK, TWO, assert_same, resumed, state
from tests.fixtures_graph import plan_by_hand, rerecord
from tests.processes import Notes, assert_interrupted, assert_refused, interrupted, nbl, no_leftovers


def replan(out: Path, layers: tuple[int, ...], **changes: Any) -> None:
    """Take a plan of ``layers`` for what selection wrote."""
    ws = Workspace.open(out)
    save_plan(ws.plan, replace(plan_by_hand(out, layers), **changes))
    record = ws.record("select")
    assert record is not None
    files = [out / name for name in record.files]
    ws.redrew("select", files)


def test_the_graph_is_the_baseline_rewritten_by_the_plan(stories_copy: Path, tmp_path: Path) -> None:
    replan(stories_copy, (1, 3, 4))
    listener = Notes()
    rewrite(resumed(stories_copy, listener))
    assert listener.kept == []
    ws = Workspace.open(stories_copy)
    # The same by the function alone, to the bit; there it has all weights in a file of its own.
    rewrite_file(ws.baseline, load_plan(ws.plan), tmp_path / "model.onnx")
    assert onnx.load(str(ws.model)) == onnx.load(str(tmp_path / "model.onnx"))
    proto = onnx.load(str(ws.model), load_external_data=False)
    assert sum(i.name.startswith("past_key_values.") for i in proto.graph.input) == 2 * 2
    summary = json.loads(ws.rewrite_summary.read_text())
    # Every layer is proven, also those that stay: the regions found are the model's.
    assert [proof["layer"] for proof in summary["proofs"]] == [0, 1, 2, 3, 4]
    made = {
        name
        for node in onnx.load(str(ws.baseline), load_external_data=False).graph.node
        for name in node.output
    }
    assert [tensor["layer"] for tensor in summary["tensors"]] == [0, 1, 2, 3, 4]
    assert {tensor[side] for tensor in summary["tensors"] for side in ("input", "output")} < made
    assert all(shape[-1] == 64 for tensor in summary["tensors"] for shape in tensor["shapes"])
    record = ws.record("rewrite")
    assert record is not None and {"model.onnx", "model.onnx.data", "nbl/rewrite.json"} <= set(record.files)
    again = Notes()
    rewrite(resumed(stories_copy, again))
    assert again.kept == ["rewrite"]


def test_another_export_takes_the_rewritten_graph_away(stories_copy: Path) -> None:
    """It reads the weights that are replaced."""
    api.export(stories_copy, api.ExportSettings("bf16"))
    assert not (stories_copy / "model.onnx").exists()
    with pytest.raises(InputError, match=r"`rewrite` in .* is out of date"):
        current_rewrite(Workspace.open(stories_copy))
    api.rewrite(stories_copy)
    assert current_rewrite(Workspace.open(stories_copy)).key


def test_a_plan_of_another_model_is_refused_and_the_old_graph_stays(stories_copy: Path) -> None:
    before = (stories_copy / "model.onnx").read_bytes()
    replan(stories_copy, (1, 2), model="f" * 64)
    with pytest.raises(
        InputError, match=rf"is the plan of another model: run `nbl-export select {stories_copy}`"
    ):
        rewrite(resumed(stories_copy))
    assert (stories_copy / "model.onnx").read_bytes() == before


# rewrite dropped -----------------------------------------------------------------------------------

NO = api.FolderSettings("no")


@pytest.fixture(scope="module")
def dropped(
    stories_out: Path, stories_folder: Path, calibration: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The finished run, run again without its baseline."""
    out = tmp_path_factory.mktemp("dropped") / "out"
    shutil.copytree(stories_out, out)
    assert api.run(stories_folder, out, TWO, calibration, QUICK, folder=NO).passed
    return out


@pytest.fixture
def dropped_copy(dropped: Path, tmp_path: Path) -> Path:
    shutil.copytree(dropped, tmp_path / "out")
    return tmp_path / "out"


def test_the_linearized_graph_stands_alone(dropped: Path, stories_out: Path) -> None:
    assert not (dropped / "baseline").exists()
    path = dropped / "model.onnx"
    assert external_files(load_graph(path)) == [path.with_name("model.onnx.data")]
    onnx.checker.check_model(str(path))
    assert onnx.load(str(path)) == onnx.load(str(stories_out / "model.onnx"))
    before = stories_out / "baseline" / "model.onnx.data"
    assert path.with_name("model.onnx.data").stat().st_size < before.stat().st_size


VERBS: dict[str, Callable[[Path], Any]] = {
    "verify": lambda out: api.verify(out, api.VerifySettings(quality=False, speed=False, decode_steps=2)),
    "bench": lambda out: api.bench(out, api.BenchSettings(batches=(1,), contexts=(16,))),
    "eval": lambda out: api.evaluate(out, api.EvalSettings()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_needs_it_says_so(dropped_copy: Path, verb: str) -> None:
    with pytest.raises(
        InputError,
        match=r"has no unmodified graph any more \(--keep-baseline no\): run `nbl-export export .*` first\.$",
    ):
        VERBS[verb](dropped_copy)


def test_an_export_makes_it_again(dropped_copy: Path, stories_out: Path) -> None:
    api.export(dropped_copy)
    for name in ("model.onnx", "model.onnx.data"):
        assert_same(dropped_copy / "baseline" / name, stories_out / "baseline" / name)
    # The graph that stands alone is still of it.
    assert api.verify(dropped_copy, api.VerifySettings(quality=False, speed=False, decode_steps=2)).passed
    assert "dropped" not in state(dropped_copy)["export"] or not state(dropped_copy)["export"]["dropped"]


# export --------------------------------------------------------------------------------------------

CONCAT = api.ExportSettings("fp32", "concat")


@pytest.fixture(scope="module")
def out(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny model was exported; read only."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    with opened(folder, CONCAT, model=tiny_folder, new=True) as (run, asked):
        export(run, asked)
    return folder


def test_consumers_find_the_model_and_its_tokenizer_beside_it(out: Path, tiny_folder: Path) -> None:
    beside = out / "baseline"
    ours, theirs = AutoConfig.from_pretrained(beside), AutoConfig.from_pretrained(tiny_folder)
    assert ours.model_type == "llama" and ours.num_hidden_layers == theirs.num_hidden_layers
    words = "Once upon a time, ünusual words"
    tokens = [AutoTokenizer.from_pretrained(f)(words)["input_ids"] for f in (beside, tiny_folder)]
    assert tokens[0] == tokens[1]
    decoder = json.loads((beside / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 8)
    record = Workspace.open(out).record("export")
    assert record is not None
    written = {f"baseline/{p.name}" for p in beside.iterdir()}
    assert set(record.files) == {*written, "nbl/export.json"}, "all of it is recorded, nothing is left over"
    assert json.loads((out / "nbl" / "export.json").read_text()) == {"kept_float32": [], "copies": []}


def test_an_export_is_kept_whoever_would_run_the_exporter(out: Path) -> None:
    listener = Notes()
    export(resumed(out, listener), CONCAT)
    export(
        resumed(out, listener),
        api.ExportSettings("fp32", "concat", exporter_python="/usr/bin/python-of-another"),
    )
    # Without a form, it is the one that suits a decoder.
    export(resumed(out, listener), api.ExportSettings().resolve(task_named("text-generation")))
    assert listener.kept == ["export"] * 3 and listener.tasks == []


def test_another_form_replaces_it_and_what_it_does_not_have_is_gone(out: Path, tmp_path: Path) -> None:
    out, listener = Path(shutil.copytree(out, tmp_path / "out")), Notes()
    assert (out / "baseline" / "genai_config.json").exists()
    export(resumed(out, listener), api.ExportSettings("bf16", "static"))
    assert listener.kept == []
    # onnxruntime-genai cannot run a static cache; a configuration for it would be of the graph before.
    assert not (out / "baseline" / "genai_config.json").exists()
    proto = onnx.load(str(out / "baseline" / "model.onnx"), load_external_data=False)
    kinds = {i.name: i.type.tensor_type.elem_type for i in proto.graph.input}
    assert kinds["write_indices"] == onnx.TensorProto.INT64
    assert kinds["past_key_values.0.key"] == onnx.TensorProto.BFLOAT16
    record = Workspace.open(out).record("export")
    assert record is not None and (record.settings["precision"], record.settings["kv_cache"]) == (
        "bf16",
        "static",
    )
    assert "exporter_python" not in record.settings


def test_what_a_graph_of_embeddings_is_not_given_is_said(wrapper: Callable[[str], Calibrated]) -> None:
    assert "(deepstack), for which the graph has no inputs" in not_given(wrapper("qwen3-vl").model)
    assert not_given(wrapper("qwen2.5-vl").model) == ""


# build --------------------------------------------------------------------------------------

FAST = ["--decode-steps", "2", "--no-quality", "--no-speed"]
SMALL = ["--trt", "rtx", "--max-batch", "1", "--max-seq", "16", "--max-context", "64", "--sm", "86"]


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


# damage ------------------------------------------------------------------------------------------


def test_a_damaged_engine_is_not_verified(built_copy: Path) -> None:
    path = built_copy / "engine" / "model.engine"
    raw = path.read_bytes()
    path.write_bytes(raw[:1234] + bytes([raw[1234] ^ 1]) + raw[1235:])
    before = (built_copy / "report" / "report.json").read_bytes()
    assert_refused(nbl("verify", built_copy, *FAST), 2, str(path), "nbl-export build", quietly=False)
    assert (built_copy / "report" / "report.json").read_bytes() == before


def test_engines_of_another_rewrite_are_passed_over_aloud(built_copy: Path) -> None:
    """The layers are others: what was built before says nothing of them, and the report says that."""
    out = built_copy
    settings = api.VerifySettings(quality=False, speed=False)
    notes = Notes()
    assert {c.name for c in api.verify(out, settings, notes).checks} >= {"engine build", "engine run"}
    assert not any("engines" in note for note in notes.notes)
    api.select(out, api.SelectSettings(layers=(0, 1)))
    api.rewrite(out)
    why = f"the engines in {out / 'engine'} are of other graphs ("
    notes = Notes()
    report = api.verify(out, settings, notes)
    found = {c.name: c for c in report.checks}
    assert "engine build" not in found and report.engines is None and report.engine_parity is None
    assert (found["engine run"].status, report.passed) == ("skipped", True)
    detail = found["engine run"].detail
    assert detail.startswith(why) and detail.endswith(f"): run `nbl-export build {out}`"), detail
    assert f"Not verified: {detail}." in notes.notes


def test_a_damaged_configuration_is_an_error_in_words(built_copy: Path) -> None:
    (built_copy / "baseline" / "config.json").write_text('{"max_position_embeddings": "many"}')
    rerecord(built_copy, "export")
    done = nbl("build", built_copy, *SMALL)
    assert_refused(done, 2, "config.json", "nbl-export export", quietly=False)


# inspect -----------------------------------------------------------------------------------------


def test_inspect_shows_an_engine(built_out: Path) -> None:
    found = json.loads((built_out / "engine" / "model.json").read_text())
    done = nbl("inspect", "engine/model.engine", cwd=built_out)
    assert done.code == 0 and done.err == ""
    for words in (
        "linearized",
        ", ".join(map(str, found["linear_layers"])),
        ", ".join(map(str, found["kv_layers"])),
        f"tensorrt-rtx {found['library_version']}",
        found["hashes"]["engine"],
        found["hashes"]["plan"],
        "prefill: input_ids",
        "2×64",
        "decode: write_indices",
        "2×4×256×8",
        "past_key_values.2.value",
        "?×4×256×8",
        "HALF",
        "SM89, SM86",
    ):
        assert words in done.out, words
    assert "past_key_values.3" not in done.out
    if find_gpu() is None:
        assert "no: no NVIDIA GPU" in done.out


def test_inspect_of_half_an_engine_is_refused(built_copy: Path) -> None:
    path = built_copy / "engine" / "model.engine"
    path.write_bytes(path.read_bytes()[:2000])
    assert_refused(nbl("inspect", path), 2, str(path), "was changed")


# forms, room, interrupts -------------------------------------------------------------------------


def test_ctrl_c_while_the_library_works_leaves_what_there_was(built_copy: Path) -> None:
    before = engines(built_copy)
    done = interrupted("Building base", "build", built_copy, *SMALL, delay=0.4)
    assert_interrupted(done)
    no_leftovers(built_copy)
    assert not list(built_copy.rglob(".*.nbl.tmp"))
    assert engines(built_copy) == before
