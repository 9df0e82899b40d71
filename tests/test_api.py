"""The verbs as functions: what each gives back, whose folder it works on, and what it refuses before it makes one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.workspace import Workspace
from tests.finished import QUICK, TWO, assert_same, state, times
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
