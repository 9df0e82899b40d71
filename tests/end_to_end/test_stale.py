"""Nothing stale passes: what was made of other inputs than those there are is refused, or made again and said."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.stage_record import STAGES
from tests.finished import QUICK, TWO, VERIFY
from tests.listening import Notes

GENERATION = "generation_config.json"


@pytest.fixture
def model(stories_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model whose files may be changed."""
    return Path(shutil.copytree(stories_folder, tmp_path / "model"))


@pytest.fixture
def out(stories_copy: Path, model: Path) -> Path:
    """The finished run on stories260K, of that copy."""
    path = stories_copy / "nbl" / "workspace.json"
    state = json.loads(path.read_text())
    state["model"]["path"] = str(model)
    path.write_text(json.dumps(state))
    return stories_copy


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


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
    with gzip.open(calibration.sources[0], "rt", encoding="utf-8") as file:
        text.write_text("\n\n".join(json.loads(line)["text"] for line in list(file)[200:]))
    api.calibrate(model, out, replace(calibration, sources=(str(text),)))
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


def test_what_an_earlier_version_of_a_stage_made_is_made_again(
    out: Path, model: Path, calibration: api.CalibrateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = "rewrite"
    monkeypatch.setitem(STAGES, stage, STAGES[stage] + 1)
    notes = Notes()
    api.run(model, out, TWO, calibration, VERIFY, notes)
    assert stage not in notes.kept
    assert f"{stage}: done again, since it was made by another version of nbl-export." in notes.notes


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
