"""The verbs as functions: what each gives back and refuses; nothing stale passes, or is made again and said."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.calibrate.moments import load_moments
from nbl_export.calibrate.text import load_text
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.workspace import Workspace
from tests.calibrate.test_collect import assert_same as assert_near
from tests.finished import QUICK, TWO, VERIFY, assert_same, state, times
from tests.processes import Done, Notes, edit, no_leftovers, torchrun
from tests.tiny import build


def test_separate_verbs_give_the_files_of_one_run(
    stories_out: Path, stories_folder: Path, calibration: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert api.calibrate(stories_folder, out, calibration) == out / "nbl" / "moments"
    # The order of selecting and exporting does not matter.
    assert api.export(out) == out / "baseline" / "model.onnx"
    plan = api.select(out, TWO)
    assert plan.chosen == load_plan(Workspace.open(stories_out).plan).chosen
    assert api.rewrite(out) == out / "model.onnx"
    assert api.verify(out, QUICK).passed
    for name in (
        "model.onnx",
        "model.onnx.data",
        "baseline/model.onnx",
        "baseline/model.onnx.data",
        "config.json",
        *(f"nbl/{name}.safetensors" for name in ("plan", "probe", "text")),
        *(f"nbl/moments/00{layer}.safetensors" for layer in range(5)),
    ):
        assert_same(out / name, stories_out / name)


def test_every_verb_is_named_and_its_settings_too() -> None:
    """What the command line can do, the API can."""
    from nbl_export.cli.main import COMMANDS

    verbs = {{"eval": "evaluate"}.get(name, name.replace("-", "_")) for name in COMMANDS}
    assert verbs <= set(api.__all__)
    for name in api.__all__:
        assert hasattr(api, name), name


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "scipy", "matplotlib", "lm_eval")
    code = f"import sys; from nbl_export import api; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# refusals -----------------------------------------------------------------------------------------


def test_the_folder_of_another_model_is_refused(stories_copy: Path, tmp_path: Path, calibration: Any) -> None:
    other = build(tmp_path / "other", num_hidden_layers=1)
    before = times(stories_copy), state(stories_copy)
    with pytest.raises(InputError, match="belongs to another model"):
        api.run(other, stories_copy, api.SelectSettings(k=1), calibration)
    with pytest.raises(InputError, match="belongs to another model"):
        api.calibrate(other, stories_copy, calibration)
    assert (times(stories_copy), state(stories_copy)) == before


@pytest.mark.parametrize(
    "verb",
    [
        lambda out: api.select(out, TWO),
        api.export,
        api.rewrite,
        api.build,
        api.verify,
        lambda out: api.evaluate(out, api.EvalSettings()),
        api.bench,
        api.report,
    ],
    ids=["select", "export", "rewrite", "build", "verify", "evaluate", "bench", "report"],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, verb: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(folder)):
            verb(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# transformers --------------------------------------------------------------------------------------


def test_the_import_registers_every_type() -> None:
    code = (
        "from transformers import CONFIG_MAPPING\n"
        "assert 'nbl_llama' not in CONFIG_MAPPING\n"
        "import nbl_export.transformers\n"
        "from nbl_export.models.modeling_nbl import TYPES\n"
        "assert all('nbl_' + one in CONFIG_MAPPING for one in TYPES)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# stale -----------------------------------------------------------------------------------

GENERATION = "generation_config.json"


@pytest.fixture
def model(stories_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model whose files may be changed."""
    return Path(shutil.copytree(stories_folder, tmp_path / "model"))


@pytest.fixture
def out(stories_copy: Path, model: Path) -> Path:
    """The finished run on stories260K, of that copy."""
    edit(stories_copy / "nbl" / "workspace.json", lambda state: state["model"].update(path=str(model)))
    return stories_copy


def later(out: Path) -> dict[str, Callable[[], object]]:
    """The commands that read what selection made."""
    return {
        "rewrite": lambda: api.rewrite(out),
        "verify": lambda: api.verify(out, QUICK),
        "eval": lambda: api.evaluate(out, api.EvalSettings(retrieval_samples=1)),
        "bench": lambda: api.bench(out, api.BenchSettings(batches=(1,), contexts=(8,))),
    }


def test_after_another_calibration_nothing_made_of_the_last_one_is_read(
    out: Path, model: Path, calibration: api.CalibrateSettings, tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    with gzip.open(calibration.calibration[0], "rt", encoding="utf-8") as file:
        text.write_text("\n\n".join(json.loads(line)["text"] for line in list(file)[200:]))
    api.calibrate(model, out, replace(calibration, calibration=(str(text),)))
    for use in later(out).values():
        with pytest.raises(
            InputError, match=r"out of date \(`calibrate` was done again\): run `nbl-export select"
        ):
            use()
    api.select(out, TWO)
    with pytest.raises(InputError, match=r"out of date \(`select` was done again\): run `nbl-export rewrite"):
        api.verify(out, QUICK)
    api.rewrite(out)
    assert str(text) in str(api.verify(out, QUICK).selection.sources)


def test_a_run_says_what_it_does_again_and_why(
    out: Path, model: Path, calibration: api.CalibrateSettings
) -> None:
    notes = Notes()
    api.run(model, out, replace(TWO, k=1), calibration, QUICK, notes)
    said = [note for note in notes.notes if "done again" in note]
    assert said == [
        "select: done again, since it was made with another k.",
        "rewrite: done again, since `select` was done again.",
        "verify: done again, since `rewrite` was done again.",
    ]
    assert notes.kept == ["calibrate", "export"]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "new_code.py", "model.safetensors.index.json"])
def test_another_file_that_loading_reads_makes_everything_stale(out: Path, model: Path, name: str) -> None:
    assert api.verify(out, VERIFY).passed
    path = model / name
    if path.exists():
        edit(path, lambda value: value.update(clean_up_tokenization_spaces=True, added=1))
    else:
        path.write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match="the model's tokenizer, code or other files have changed"):
        api.verify(out, VERIFY)


@pytest.mark.parametrize("name", [GENERATION, "chat_template.jinja"])
def test_a_file_that_travels_with_the_graph_is_exported_again(
    out: Path, model: Path, calibration: api.CalibrateSettings, name: str
) -> None:
    (model / name).write_text(
        '{"eos_token_id": [2, 7]}' if name == GENERATION else "{{ messages[0].content }}"
    )
    with pytest.raises(InputError, match="generation configuration or chat template has changed"):
        api.rewrite(out)
    notes = Notes()
    api.run(model, out, TWO, calibration, QUICK, notes)
    assert notes.kept == ["calibrate", "select"]
    if name == GENERATION:
        assert json.loads((out / GENERATION).read_text())["eos_token_id"] == [2, 7]


def test_text_of_other_settings_is_not_taken_for_that_of_a_killed_calibration(
    out: Path, model: Path, calibration: api.CalibrateSettings
) -> None:
    """Killed between the text and its record: the record is of the text before."""
    text, other = out / "nbl" / "text.safetensors", replace(calibration, samples=16)
    before = text.read_bytes()
    record = (out / "nbl" / "text.json").read_bytes()
    api.calibrate(model, out, other)
    assert text.read_bytes() != before
    (out / "nbl" / "text.json").write_bytes(record)
    api.calibrate(model, out, calibration)
    assert text.read_bytes() == before


LAYERS = 5
# Kills the process VICTIM when it has passed AT blocks.
KILLED = """
import os, signal
from nbl_export.calibrate.moments import Accumulator
from nbl_export.cli.main import main

passed, results = [], Accumulator.results

def counted(sums, ranks):
    if len(passed) == int(os.environ["AT"]) and os.environ["RANK"] == os.environ["VICTIM"]:
        os.kill(os.getpid(), signal.SIGKILL)
    passed.append(None)
    yield from results(sums, ranks)

Accumulator.results = counted
main()
"""


@pytest.fixture(scope="module")
def asked(stories_text: Path) -> api.CalibrateSettings:
    return api.CalibrateSettings((str(stories_text),), samples=64, seq_len=128, heldout_samples=4)


@pytest.fixture(scope="module")
def options(asked: api.CalibrateSettings) -> list[object]:
    """What is asked, on the command line."""
    sizes = ("--samples", asked.samples, "--seq-len", asked.seq_len)
    return ["--calibration", *asked.calibration, *sizes, "--heldout-samples", asked.heldout_samples]


@pytest.fixture(scope="module")
def alone(
    stories_folder: Path, asked: api.CalibrateSettings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Calibrated by one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    api.calibrate(stories_folder, out, asked)
    return out


@pytest.fixture(scope="module")
def both(stories_folder: Path, options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated by two processes, with one voice."""
    out = tmp_path_factory.mktemp("both") / "out"
    done = torchrun(2, "calibrate", stories_folder, "-o", out, *options)
    assert done.code == 0, done
    assert done.out == f"Calibrated. Next: nbl-export select {out} --k K\n"
    titles = ("Loading", "Running a short text", "Reading text", "Recording the probe", "Calibrating layer")
    bars = done.err.splitlines()
    assert len(bars) == len(titles), bars
    assert all(title in bar for title, bar in zip(titles, bars, strict=True)), bars
    no_leftovers(out)
    return out


def assert_same_moments(one: Path, other: Path) -> None:
    (want, about), (found, also) = (load_moments(Workspace.open(out).moments) for out in (one, other))
    assert about == also and len(found.layers) == LAYERS
    assert_near(found, want, 1e-12)


def assert_said_once(done: Done, *words: str) -> None:
    """One sentence of all processes, nothing on stdout, and torchrun fails."""
    assert done.code == 1 and done.out == ""
    assert "Traceback" not in done.err and "Internal error" not in done.err
    said = [line for line in done.err.splitlines() if "error: " in line]
    assert len(said) == 1 and said[0].startswith("error: "), done.err
    for word in words:
        assert word in said[0]


def test_two_processes_calibrate_as_one_does(alone: Path, both: Path) -> None:
    assert_same_moments(alone, both)
    one, two = (load_text(Workspace.open(out).text) for out in (alone, both))
    np.testing.assert_array_equal(one.calibration, two.calibration)
    assert Workspace.open(alone).record("calibrate").key == Workspace.open(both).record("calibrate").key  # type: ignore[union-attr]


def test_two_processes_select_as_one_does(alone: Path, both: Path, tmp_path: Path) -> None:
    one = Path(shutil.copytree(alone, tmp_path / "one", copy_function=shutil.copy2))
    plan = api.select(one, api.SelectSettings(k=2))
    two = Path(shutil.copytree(both, tmp_path / "two", copy_function=shutil.copy2))
    done = torchrun(2, "select", two, "--k", 2)
    assert done.code == 0, done
    assert done.out.startswith(f"Plan: layers {', '.join(map(str, plan.chosen))}. Next:")
    assert done.err.count("Scoring layers") == done.err.count("Measuring layers") == 1
    found = load_plan(Workspace.open(two).plan)
    assert found.chosen == plan.chosen
    for index, layer in plan.layers.items():
        for want, have in ((layer.w, found.layers[index].w), (layer.b, found.layers[index].b)):
            assert np.linalg.norm(have - want) <= 1e-6 * np.linalg.norm(want)
    no_leftovers(two)


def test_a_killed_process_ends_all_and_any_number_goes_on(
    stories_folder: Path,
    asked: api.CalibrateSettings,
    options: list[object],
    alone: Path,
    tmp_path: Path,
) -> None:
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED)
    command = ("calibrate", stories_folder, "-o", out, *options)
    first: dict[Path, int] = {}
    partial = Workspace(out).partial_moments
    for victim, at in ((1, 2), (0, 4)):
        done = torchrun(2, *command, script=script, VICTIM=str(victim), AT=str(at))
        assert_said_once(done, "run the same command again")
        kept = {path: path.stat().st_mtime_ns for path in partial.iterdir()}
        assert sorted(path.name for path in kept) == [f"{index:03}.safetensors" for index in range(at)]
        # The second run does not write again what the first finished, and the third nothing of both.
        assert {path: kept[path] for path in first} == first
        first = kept
        no_leftovers(out)
    before = {path.name: path.stat().st_ino for path in first}
    api.calibrate(stories_folder, out, asked)
    moments = Workspace.open(out).moments
    assert {name: (moments / name).stat().st_ino for name in before} == before
    assert_same_moments(alone, out)
