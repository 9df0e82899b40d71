"""This package in an environment with transformers 4.57: its graphs compute what transformers 5 does here.

The model's folder is written by 5, which 4 would read as a model with another rotary base.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.runtime.ort import ort_stream
from nbl_export.workspace import Workspace
from tests.export.exported import BASE
from tests.exporters import optimum_python
from tests.fixtures_graph import load, original_logits, ragged_rows
from tests.tiny import build

ROOT = Path(__file__).parents[2]
FORMS = ("concat", "static")
K = 2
RUN = """
import sys
import transformers
from nbl_export import api
from nbl_export.models.compat import is_transformers_4

assert is_transformers_4(), transformers.__version__
model, text, out, k, *forms = sys.argv[1:]
for form in forms:
    report = api.run(
        model,
        f"{out}/{form}",
        api.SelectSettings(k=int(k)),
        api.CalibrateSettings((text,), samples=32, seq_len=32, heldout_samples=4),
        api.VerifySettings(decode_steps=3, quality=False, speed=False),
        exporting=api.ExportSettings(kv_cache=form),
    )
    assert report.passed, report.checks
"""


def run(python: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [python, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def python() -> str:
    """A Python with transformers 4.57 and what this package needs; the tests are skipped where there is none."""
    found = optimum_python()
    imported = run(found, "import nbl_export.cli, nbl_export.api, scipy, onnxruntime, onnx_ir, junitparser")
    if imported.returncode:
        pytest.skip(f"needs what this package requires in {found}: {imported.stderr.splitlines()[-1]}")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("written-by-5") / "tiny", rope_parameters=BASE)


@pytest.fixture(scope="module")
def out(python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished runs, one folder for each form of the cache."""
    folder = tmp_path_factory.mktemp("made-with-4")
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 4000, dtype=np.uint8)
    documents = folder / "documents"
    documents.mkdir()
    for index, document in enumerate(letters.reshape(16, -1)):
        (documents / f"{index:02}.txt").write_bytes(document.tobytes())
    done = run(python, RUN, str(model), str(documents), str(folder), str(K), *FORMS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_graphs_made_with_4_compute_what_5_does(model: Path, out: Path, form: str) -> None:
    workspace = Workspace.open(out / form)
    plan = load_plan(workspace.plan)
    assert len(plan.layers) == K
    (row,) = ragged_rows([20], vocab=258)
    original = load(model)
    before = original_logits(original, row)
    with linearized(original, plan):
        after = original_logits(original, row)
    assert np.abs(after - before).max() > 0.1
    for graph, expected in ((workspace.baseline, before), (workspace.model, after)):
        stream = ort_stream(graph, 64)
        steps = [stream.prefill([row[:12]]), *(stream.decode([int(token)]) for token in row[12:])]
        np.testing.assert_allclose(np.concatenate(steps), expected, atol=1e-4)
