"""The product's main job on a real language model, as a user would do it: caches, engines, exporters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.folder import find_pooling, task_named
from nbl_export.models.forward import encoder_of
from nbl_export.report.schema import load_report
from nbl_export.runtime.torch import TorchEncoder
from tests.fixtures_graph import cpu_session

pytestmark = pytest.mark.timeout(1800)
FEW = 6


@pytest.fixture(scope="module")
def beginning(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of SmolLM2, with its own weights and sizes, in a fifth of the time."""
    folder = tmp_path_factory.mktemp("beginning") / "model"
    given = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    small = LlamaConfig.from_dict(
        {**model.config.to_dict(), "num_hidden_layers": FEW, "quantization_config": None}
    )
    whole = {name: value.float() for name, value in model.state_dict().items()}
    cut = LlamaForCausalLM(small)
    cut.load_state_dict({name: whole[name] for name in cut.state_dict()})
    cut.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**given).save_pretrained(folder)
    return folder


def test_fp16_engines_with_fused_attention(beginning: Path, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx to build engines")
    text = shared_data / "text" / "c4_exllamav2_118.jsonl.gz"
    out, k, cache = tmp_path / "out", 2, "static"
    command = [sys.executable, "-m", "nbl_export", str(beginning), "--k", str(k), "-o", str(out)]
    # A CPU runs fp16 slowly: its speed says nothing, and few steps are enough for a second look at the engines' graph.
    command += ["--trt", "rtx", "--precision", "fp16", "--kv-cache", cache, "--no-quality", "--no-speed"]
    command += ["--decode-steps", "2"]
    command += ["--calibration", str(text), "--samples", "16", "--seq-len", "256", "--heldout-samples", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NBL_EXPORT_DEBUG": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report" / "report.json").read_text())
    checks = {c["name"]: c for c in report["checks"]}
    assert report["verdict"] == checks["parity"]["status"] == checks["engine build"]["status"] == "passed"
    assert report["graph"]["precision"] == "fp16" and report["graph"]["kv_cache"] == cache
    base, linear = report["engines"]
    _check_engine(base, FEW)
    _check_engine(linear, FEW - k)
    assert base["profiles"] and [p["name"] for p in base["profiles"]] == ["prefill", "decode"]
    # Per layer: q and o [576, 576], k and v [576, 192] in half go, W [576, 576] and b [576] come.
    removed = 2 * k * (2 * 576 * 576 + 2 * 576 * 192 - 576 * 576 - 576)
    weights = [sum(e["network"]["weight_bytes"].values()) for e in (base, linear)]
    assert weights[0] - weights[1] == pytest.approx(removed, rel=0.01)
    assert base["size"] - linear["size"] > 0.95 * removed
    run = checks["engine run"]
    if run["status"] == "skipped":
        assert "ahead of time for SM80, SM86, SM89" in run["detail"] and "not run" in run["detail"]


def _check_engine(manifest: dict[str, Any], attention: int) -> None:
    network = manifest["network"]
    assert network["attention"] == attention and manifest["attention"] == "fused"
    assert network["kv_cache_updates"] == 2 * attention
    past = [t for t in network["inputs"] if t["name"].startswith("past_key_values.")]
    present = [t for t in network["outputs"] if t["name"].startswith("present.")]
    assert len(past) == len(present) == 2 * attention == 2 * len(manifest["kv_layers"])
    assert {t["dtype"] for t in (*past, *present)} == {"HALF"}
    assert network["weight_bytes"]["HALF"] > 0.95 * sum(network["weight_bytes"].values())


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
def minilm_out(minilm: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_the_linear_graph_is_linear_pytorch(minilm: Path, minilm_out: Path) -> None:
    batch = dict(AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="np"))
    model = AutoModel.from_pretrained(minilm).eval()
    plan = load_plan(minilm_out / "nbl" / "plan.json")
    encoder = TorchEncoder(encoder_of(model, task_named("feature-extraction"), find_pooling(minilm), batch))
    with linearized(model, plan):
        expected = encoder(batch)["sentence_embedding"]
    found = cpu_session(minilm_out / "model.onnx").run(["sentence_embedding"], batch)[0]
    assert (found * expected).sum(axis=1).min() > 0.99999
    assert (found * encoder(batch)["sentence_embedding"]).sum(axis=1).max() < 0.9999  # it is not the original


def test_the_report_has_the_method_s_loss(minilm_out: Path) -> None:
    report = load_report(minilm_out / "report" / "report.json")
    assert report.passed and len(report.selection.layers) == 2
    assert report.method_loss and report.speed
    cosines = {m.what: m.value for m in report.method_loss.measures}
    assert 0.85 < cosines["cosine of sentence_embedding"] < 0.9999
