"""The verbs as functions: what each gives back, whose folder it works on, and what it refuses before it makes one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api, digests
from nbl_export.errors import InputError
from nbl_export.files import sha256_of
from nbl_export.linearize.plan import load_plan
from nbl_export.workspace import Workspace
from tests.finished import QUICK, TWO, assert_same, state, times
from tests.listening import Notes
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


# what is read -------------------------------------------------------------------------------------


def test_nothing_is_read_twice_to_learn_that_it_has_not_changed(
    stories_copy: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model, and of the graphs with their data."""
    reads: Counter[str] = Counter()

    def counted(stream: Any, done: Any = None) -> str:
        reads[str(Path(f"/proc/self/fd/{stream.fileno()}").readlink())] += 1
        return sha256_of(stream, done)

    Workspace.open(stories_copy).digests_file.unlink(missing_ok=True)
    monkeypatch.setattr(digests, "sha256_of", counted)
    listener = Notes()
    for _ in range(2):
        api.export(stories_copy, listener=listener)
        api.rewrite(stories_copy, listener)
    assert listener.kept == ["export", "rewrite"] * 2
    for path in (stories_folder / "model.safetensors", stories_copy / "model.onnx.data"):
        assert reads[str(path)] == 1, path
    assert set(reads.values()) == {1}
    api.rewrite(stories_copy, listener, rehash=True)
    assert reads[str(stories_folder / "model.safetensors")] == 2
    edited = stories_copy / "model.onnx.data"
    times = edited.stat()
    raw = bytearray(edited.read_bytes())
    raw[100] ^= 1
    edited.write_bytes(raw)
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))
    api.rewrite(stories_copy, listener)
    assert listener.notes[-1].endswith("since model.onnx.data is missing or was changed.")


# transformers --------------------------------------------------------------------------------------


def test_the_import_registers_every_type() -> None:
    code = (
        "from transformers import CONFIG_MAPPING\n"
        "assert 'nbl_llama' not in CONFIG_MAPPING\n"
        "import nbl_export.transformers\n"
        "from nbl_export.models.registered import TYPES\n"
        "assert all('nbl_' + one in CONFIG_MAPPING for one in TYPES)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
