"""What is refused before a model's weights are read, and that nothing is which a stage would take."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from nbl_export import __version__, api, files
from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.models import load
from nbl_export.models.source import find_model
from nbl_export.report.drawing import Table
from nbl_export.settings import RunSettings
from nbl_export.stages.in_order import check_source
from nbl_export.stages.inspection import inspect
from nbl_export.stages.run import opened
from nbl_export.workspace import Workspace
from tests.families import build
from tests.finished import TWO
from tests.models.test_source import edit_config, one_sentence
from tests.processes import Notes, files_in
from tests.tiny import text_encoder, vision_encoder


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a file that is hashed, or a model that is loaded, fails the test."""

    def read(*_: Any) -> Any:
        pytest.fail("a file was hashed, or the model loaded")

    monkeypatch.setattr(files, "sha256_of", read)
    monkeypatch.setattr(load, "load_model", read)


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of four layers, of width 32, that may be spoiled."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        work()
    return one_sentence(caught)


# a run --------------------------------------------------------------------------------------------

BEYOND: dict[str, tuple[dict[str, Any], str, str]] = {
    "k": ({"k": 99}, "attention", "--k is 99; it must be between 0 and 4 (the model's attention layers)."),
    "k of MLPs": ({"k": 5}, "mlp", "--k is 5; it must be between 0 and 4 (the model's MLPs)."),
    "k of both": ({"k": 9}, "both", "between 0 and 8 (the model's attention layers and MLPs)."),
    "k with spans": ({"k": 9}, "all", "between 0 and 8 (the model's attention layers and MLPs)."),
    "a layer": ({"layers": (1, 99)}, "attention", "names layer 99; the layers that can be are 0, 1, 2, 3."),
    "an MLP": (
        {"layers": (Mlp(3),)},
        "attention",
        "names the MLP of layer 3, and there are no moments of MLPs: calibrate with --blocks both.",
    ),
    "a span": (
        {"layers": (Span(1, 2),)},
        "both",
        "names layers 1 to 2 as a whole, and there are no moments of spans: calibrate with --blocks all.",
    ),
    "a long span": ({"layers": (Span(1, 6),)}, "all", "names 1-6.span, which is not among the spans"),
    "rank": ({"k": 1, "rank": 16}, "attention", "--rank is 16; two factors of that rank are not smaller"),
    "fit": ({"k": 1, "fit": "sequential"}, "all", "--fit sequential is for attentions and MLPs"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_configuration_has_not(model: Path, tmp_path: Path, unread: None, name: str) -> None:
    selection, blocks, words = BEYOND[name]
    text: Any = api.CalibrateSettings(blocks=blocks)
    said = refused(lambda: api.run(model, tmp_path / "out", api.SelectSettings(**selection), text))
    assert words in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("selection", "blocks"),
    [
        ({"k": 4}, "attention"),
        ({"k": 8}, "both"),
        ({"k": 8}, "all"),
        ({"layers": (0, 3)}, "attention"),
        ({"layers": (Span(0, 3),)}, "all"),
        ({"layers": (Span(1, 2), 3, Mlp(3))}, "all"),
        ({"k": 0, "rank": 15}, "mlp"),
    ],
)
def test_the_most_that_there_can_be_is_taken(
    model: Path, tmp_path: Path, selection: dict[str, Any], blocks: Any
) -> None:
    source = find_model(str(model))
    text = api.CalibrateSettings(blocks=blocks)
    check_source(tmp_path / "out", source, RunSettings(api.SelectSettings(**selection), text))


def test_which_layers_of_a_hybrid_have_attention_is_left_to_the_model(tmp_path: Path) -> None:
    """Its configuration has four layers, of which two are attention: to name another is refused with what it is."""
    source = find_model(str(build("lfm2", tmp_path / "hybrid")))
    layers = tuple(range(4))
    for selection in (api.SelectSettings(k=4), api.SelectSettings(layers=layers)):
        check_source(tmp_path / "out", source, RunSettings(selection))
    with pytest.raises(InputError, match="--k is 5"):
        check_source(tmp_path / "out", source, RunSettings(api.SelectSettings(k=5)))


def test_text_that_is_not_there_or_not_text(model: Path, tmp_path: Path, unread: None) -> None:
    (tmp_path / "a.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, words in {
        "nosuch.txt": "The calibration text nosuch.txt does not exist: check the path.",
        str(tmp_path / "*.txt"): "has no calibration text",
        str(tmp_path / "empty"): "has no calibration text",
        str(tmp_path / "a.docx"): "is not a calibration text: give a .txt",
        str(tmp_path / "a.jsonl"): "a.jsonl, line 1: no text field 'text' (text fields: words)",
    }.items():
        text = api.CalibrateSettings((source,))
        for verb in (
            lambda t=text: api.run(model, tmp_path / "out", TWO, t),
            lambda t=text: api.calibrate(model, tmp_path / "out", t),
        ):
            assert words in refused(verb)
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there_before_a_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.models.source._hub_snapshot", lambda *_: pytest.fail("it was fetched"))
    text = api.CalibrateSettings(("nosuch.txt",))
    said = refused(lambda: api.run("owner/model", tmp_path / "out", TWO, text))
    assert said == "The calibration text nosuch.txt does not exist: check the path."


def test_a_model_without_its_tokenizer(model: Path, tmp_path: Path, unread: None) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    for verb in (
        lambda: api.run(model, tmp_path / "out", TWO),
        lambda: api.calibrate(model, tmp_path / "out"),
    ):
        assert refused(verb).startswith(f"{model} has no tokenizer: put the tokenizer.json")


def test_an_architecture_that_is_not_known_or_comes_with_code(
    model: Path, tmp_path: Path, unread: None
) -> None:
    edit_config(model, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    assert "has an architecture that transformers " in refused(lambda: api.run(model, tmp_path / "out", TWO))
    edit_config(model, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    for verb in (
        lambda: api.run(model, tmp_path / "out", TWO),
        lambda: api.calibrate(model, tmp_path / "out"),
    ):
        assert "then give --trust-remote-code." in refused(verb)
    (model / "config.json").unlink()
    assert "neither config.json nor a .gguf file" in refused(lambda: api.run(model, tmp_path / "out", TWO))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_somebody_else(model: Path, tmp_path: Path, unread: None) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.onnx").write_text("")
    for out, words in {
        tmp_path / "file": "is a file; --output must be a folder.",
        tmp_path / "theirs": "has a model.onnx that nbl-export did not write",
        model: "whose files it would change: choose another --output.",
    }.items():
        assert words in refused(lambda o=out: api.run(model, o, TWO))
        assert words in refused(lambda o=out: api.calibrate(model, o))
    assert files_in(tmp_path / "theirs") == {"model.onnx"}


def test_encoders_need_material_and_what_reads_it(tmp_path: Path, unread: None) -> None:
    cca, text = api.SelectSettings(k=1), api.CalibrateSettings(("nosuch.txt",))
    bert, vit = text_encoder(tmp_path / "bert"), vision_encoder(tmp_path / "vit")
    out = tmp_path / "out"
    assert "cannot generate its own calibration text" in refused(lambda: api.run(bert, out, cca))
    assert "nosuch.txt does not exist" in refused(lambda: api.run(bert, out, cca, text))
    assert "nosuch.txt names no image" in refused(lambda: api.run(vit, out, cca, text))
    assert "--workload is measured" in refused(
        lambda: api.run(bert, out, api.SelectSettings(k=1, workload=("prefill=8",)))
    )
    (vit / "preprocessor_config.json").unlink()
    (tmp_path / "a.png").write_bytes(b"x")
    image = api.CalibrateSettings((str(tmp_path / "a.png"),))
    assert "has no preprocessor_config.json" in refused(lambda: api.run(vit, out, cca, image))


# in a folder --------------------------------------------------------------------------------------


def test_a_stage_whose_inputs_are_not_made_yet(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out, api.CalibrateSettings(), model=tiny_folder, new=True):
        pass
    before = files_in(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sha256_of", lambda *_: pytest.fail("a file was hashed"))
        for verb, stage, command in (
            (lambda: api.select(out, TWO), "calibrate", f"nbl-export calibrate MODEL -o {out}"),
            (
                lambda: api.export(out, api.ExportSettings("fp16")),
                "calibrate",
                f"nbl-export calibrate MODEL -o {out}",
            ),
            (lambda: api.rewrite(out), "select", f"nbl-export select {out} --k K"),
            (lambda: api.verify(out), "select", f"nbl-export select {out} --k K"),
            (lambda: api.evaluate(out, api.EvalSettings()), "select", f"nbl-export select {out} --k K"),
            (lambda: api.bench(out), "select", f"nbl-export select {out} --k K"),
        ):
            assert refused(verb) == f"{out} has no finished `{stage}` yet: run `{command}` first."
    assert files_in(out) == before


# inspection ----------------------------------------------------------------------------------------


def as_dict(table: Table) -> dict[str, str]:
    return {row[0]: row[1] for row in table.rows}


@pytest.mark.parametrize("name", ["model.onnx", "baseline/model.onnx"])
def test_a_graph_is_counted(stories_out: Path, name: str) -> None:
    path = stories_out / name
    facts, ops, attention = inspect(path)
    proto = onnx.load(str(path))
    said = as_dict(facts)
    weights = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    assert said["parameters"] == f"{sum(weights.values()):,}"
    assert said["nodes"] == f"{len(proto.graph.node):,}"
    assert said["inputs / outputs"] == f"{len(proto.graph.input)} / {len(proto.graph.output)}"
    pairs = sum(i.name.startswith("past_key_values.") for i in proto.graph.input) // 2
    assert said["KV pairs"] == str(pairs) == {"model.onnx": "3", "baseline/model.onnx": "5"}[name]
    assert said["rewritten by nbl-export"] == {"model.onnx": "yes", "baseline/model.onnx": "no"}[name]
    counted = Counter(node.op_type for node in proto.graph.node)
    assert {op.split("::")[-1]: int(n.replace(",", "")) for op, n in as_dict(ops).items()} == counted
    assert [row[0] for row in attention.rows] == ["0", "1", "2", "3", "4"]
    assert said["producer"] == f"nbl-export {__version__}"


def test_attention_that_is_gone_is_called_linear(stories_out: Path) -> None:
    chosen = load_plan(stories_out / "nbl" / "plan.json").chosen
    *_, attention = inspect(stories_out / "model.onnx")
    linear = {int(row[0]) for row in attention.rows if row[1] == "linear"}
    assert linear == set(chosen) and len(linear) == 2
    left = [row for row in attention.rows if row[1] != "linear"]
    # Pairs are numbered anew, layers keep their numbers.
    assert [row[3] for row in left] == [f"past_key_values.{i}.key" for i in range(3)]
    assert all(row[2] == "float" and row[4] == "yes" for row in left)


def test_a_plan_and_moments_are_read_back(stories_out: Path) -> None:
    (plan,) = inspect(stories_out / "nbl" / "plan.json")
    raw = json.loads((stories_out / "nbl" / "plan.json").read_text())
    said = as_dict(plan)
    assert said["criterion"] == "cca" and said["layers"] == "5" and said["hidden size"] == "64"
    assert said["model fingerprint"] == raw["model"][:16]
    assert said == as_dict(inspect(stories_out / "nbl" / "plan.safetensors")[0])
    folder = stories_out / "nbl" / "moments"
    (moments,), (one,) = inspect(folder), inspect(folder / "003.safetensors")
    assert one.rows == moments.rows[3:4] and [row[:2] for row in moments.rows] == [
        (str(layer), f"{32 * 128:,}") for layer in range(5)
    ]
    sums: dict[str, Any] = load_file(folder / "003.safetensors")
    diagonal = np.cumsum(np.arange(1, 65)) - 1  # of a lower triangle, row after row
    found = [float(text) for text in one.rows[0][2:]]
    energies = [sums[name][diagonal].sum() / (32 * 128) for name in ("xx", "hh", "yy")]
    assert found == pytest.approx(energies, rel=1e-3)


def test_a_folder_lists_its_stages(stories_copy: Path) -> None:
    stages, *others = inspect(stories_copy)
    state = {row[0]: row[1] for row in stages.rows}
    assert state == {
        **dict.fromkeys(("calibrate", "select", "export", "rewrite", "verify"), "done"),
        **dict.fromkeys(("build", "eval", "bench", "convert"), "not yet"),
    }
    assert len(others) == 2
    (stories_copy / "model.onnx.data").write_bytes(b"damaged")
    state = {row[0]: row[1] for row in inspect(stories_copy)[0].rows}
    assert state["rewrite"] == "damaged: model.onnx.data" and state["export"] == "done"


@pytest.mark.parametrize("name", ["x.txt", "x.json", "x.safetensors", "x.engine", "x.onnx", "missing.onnx"])
def test_what_is_none_of_these_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    if name != "missing.onnx":
        (tmp_path / name).write_text('{"format": "of somebody else"}')
    with pytest.raises(InputError) as told:
        inspect(tmp_path / name)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


# run -----------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def work_on(folder: Path, out: Path, value: int, listener: Notes | None = None) -> bool:
    """A stage that writes one file and says so; whether it had to."""
    with opened(out, api.CalibrateSettings(), listener, model=folder, new=True) as (run, _):
        with run.stage("calibrate", {"a": value}, {}) as work:
            if work:
                with work.task("Writing", 2, "steps") as task:
                    task.advance(2)
                work.note(f"wrote {value}")
                run.workspace.probe.write_text(str(value))
                work.files = [run.workspace.probe]
        return work is not None


def test_a_stage_is_done_once_by_key_also_in_the_next_invocation(tiny_folder: Path, out: Path) -> None:
    listener = Notes()
    assert work_on(tiny_folder, out, 1, listener) and not work_on(tiny_folder, out, 1, listener)
    assert listener.notes == ["wrote 1", "calibrate: done already, kept."]
    assert listener.tasks == [("Writing", 2, "steps", 0)] and listener.advanced == [2]
    assert work_on(tiny_folder, out, 2)
    record = Workspace.open(out).record("calibrate")
    assert record is not None
    assert (record.settings, record.notes) == ({"a": 2}, ("wrote 2",))
    assert list(record.files) == ["nbl/probe.safetensors"] and record.seconds >= 0
    # What is not the file that was written is made again.
    probe = Workspace.open(out).probe
    probe.write_text("changed by hand")
    assert work_on(tiny_folder, out, 2) and probe.read_text() == "2"


@pytest.mark.parametrize(
    ("raised", "told", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "in stage `calibrate`"),
        (ValueError("a slip"), ValueError, "a slip"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["the disk is full", "a slip", "Ctrl-C"],
)
def test_a_stage_that_fails_is_not_done(
    tiny_folder: Path, out: Path, raised: BaseException, told: type[BaseException], message: str | None
) -> None:
    with (
        pytest.raises(told, match=message),
        opened(out, api.CalibrateSettings(), model=tiny_folder, new=True) as (run, _),
        run.stage("calibrate", {"a": 1}, {}),
    ):
        raise raised
    assert Workspace.open(out).record("calibrate") is None
    assert work_on(tiny_folder, out, 1)
    assert Workspace.open(out).undone("calibrate", {"a": 1}, {}) is None


# a folder in which another process works ------------------------------------------------------------


@pytest.mark.usefixtures("unread")
def test_a_folder_in_use_is_refused_before_the_model_is_read(
    stories_copy: Path, stories_folder: Path, calibration: Any
) -> None:
    with Workspace.open(stories_copy).lock():
        assert "Another nbl-export is running" in refused(
            lambda: api.run(stories_folder, stories_copy, TWO, calibration)
        )


def test_a_process_that_is_refused_late_has_changed_nothing(
    stories_copy: Path,
    stories_folder: Path,
    calibration: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other process began after the first look at the folder; the same model now lies elsewhere."""
    moved = Path(shutil.copytree(stories_folder, tmp_path / "moved"))
    before = {name: (stories_copy / name).read_bytes() for name in files_in(stories_copy)}
    monkeypatch.setattr("nbl_export.stages.run.check_free", lambda _: None)
    with Workspace.open(stories_copy).lock():
        assert "Another nbl-export is running" in refused(
            lambda: api.run(moved, stories_copy, TWO, calibration)
        )
    after = {name: (stories_copy / name).read_bytes() for name in files_in(stories_copy)}
    own = {"nbl/digests.json"}  # what each file's bytes are, which a reader may write down
    assert {n: b for n, b in after.items() if n not in own} == {
        n: b for n, b in before.items() if n not in own
    }


def test_of_processes_that_start_at_once_one_writes(
    tiny_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    places = [Path(shutil.copytree(tiny_folder, tmp_path / f"model{n}")) for n in range(3)]
    small = ["--calibration", stories_text, "--samples", 16, "--seq-len", 64, "-o", tmp_path / "out"]
    commands = [[sys.executable, "-m", "nbl_export", "calibrate", place, *small] for place in places]
    begun = [subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True) for words in commands]
    said = [process.communicate()[1] for process in begun]
    won = [place for place, process in zip(places, begun, strict=True) if process.returncode == 0]
    lost = [text for text, process in zip(said, begun, strict=True) if process.returncode]
    assert won and all("Another nbl-export is running" in text for text in lost), said
    recorded = json.loads((tmp_path / "out" / "nbl" / "workspace.json").read_text())
    assert recorded["model"]["path"] in map(str, won) and set(recorded["stages"]) == {"calibrate"}
    assert api.inspect(tmp_path / "out")[0].rows[0][:2] == ("calibrate", "done")
