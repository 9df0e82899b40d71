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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.exhaustive import exhaustive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LAYERS, K = 30, 12
FEW = 6


@pytest.fixture(scope="module")
def text(shared_data: Path) -> Path:
    return shared_data / "text" / "c4_exllamav2_118.jsonl.gz"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2") / "out"


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


@pytest.mark.parametrize(
    ("cache", "layers"),
    [("static", FEW), *(pytest.param(c, LAYERS, marks=exhaustive) for c in ("static", "concat"))],
)
def test_fp16_engines_with_fused_attention(
    request: pytest.FixtureRequest, smollm2: Path, text: Path, tmp_path: Path, cache: str, layers: int
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx to build engines")
    model = smollm2 if layers == LAYERS else request.getfixturevalue("beginning")
    out, k = tmp_path / "out", layers * K // LAYERS
    command = [sys.executable, "-m", "nbl_export", str(model), "--k", str(k), "-o", str(out)]
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
    _check_engine(base, layers, cache)
    _check_engine(linear, layers - k, cache)
    assert base["profiles"] and [p["name"] for p in base["profiles"]] == ["prefill", "decode"]
    # Per layer: q and o [576, 576], k and v [576, 192] in half go, W [576, 576] and b [576] come.
    removed = 2 * k * (2 * 576 * 576 + 2 * 576 * 192 - 576 * 576 - 576)
    weights = [sum(e["network"]["weight_bytes"].values()) for e in (base, linear)]
    assert weights[0] - weights[1] == pytest.approx(removed, rel=0.01)
    assert base["size"] - linear["size"] > 0.95 * removed
    run = checks["engine run"]
    if run["status"] == "skipped":
        assert "ahead of time for SM80, SM86, SM89" in run["detail"] and "not run" in run["detail"]


@exhaustive
@pytest.mark.parametrize(
    ("exporter", "precision", "cache"),
    [
        ("torch", "fp32", "shared"),
        *(("genai", precision, "concat") for precision in ("int4", "fp32", "fp16")),
        ("optimum", "fp32", "concat"),
    ],
)
def test_graphs_of_other_operators(
    smollm2: Path, text: Path, out: Path, exporter: str, precision: str, cache: str
) -> None:
    """One calibration and plan for all; parity within the gates, and the files shrink by what was removed."""
    if exporter == "optimum" and not os.environ.get("NBL_EXPORT_OPTIMUM_PYTHON"):
        pytest.skip("needs optimum in an environment of its own: scripts/test.sh makes one")
    command = [sys.executable, "-m", "nbl_export", str(smollm2), "--k", str(K), "-o", str(out)]
    command += ["--exporter", exporter, "--precision", precision, "--kv-cache", cache]
    # Which layers are linear is the same to an exporter: greedy search would take half of the time.
    command += ["--criterion", "cca", "--no-quality", "--no-speed"]
    command += ["--calibration", str(text), "--samples", "16", "--seq-len", "256", "--heldout-samples", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NBL_EXPORT_DEBUG": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report" / "report.json").read_text())
    checks = {c["name"]: c["status"] for c in report["checks"]}
    assert report["verdict"] == checks["parity"] == checks["graph rewrite"] == "passed"
    before, after = report["graph"]["before"], report["graph"]["after"]
    assert (before["kv_pairs"], after["kv_pairs"]) == (LAYERS, LAYERS - K)
    # Per layer: q and o [576, 576], k and v [576, 192] go, W [576, 576] comes; few bits with a scale for 32.
    removed = K * (2 * 576 * 576 + 2 * 576 * 192 - 576 * 576)
    bytes_each = {"fp32": 4, "fp16": 2, "int4": 0.5 + 4 / 32}[precision]
    shrunk = before["file_bytes"] - after["file_bytes"]
    assert shrunk == pytest.approx(removed * bytes_each, rel=0.05)
    if exporter != "optimum":
        config = json.loads((out / "genai_config.json").read_text())
        assert config["model"]["decoder"]["num_hidden_layers"] == LAYERS - K
    if precision != "fp16":  # which onnxruntime's CPU provider does not run as it stands
        _generates(out, exporter)


def _generates(out: Path, exporter: str) -> None:
    """Text from the folder as it stands: by onnxruntime-genai, or by optimum, where that made it."""
    prompt = "The capital of France is"
    if exporter == "optimum":
        python = os.environ["NBL_EXPORT_OPTIMUM_PYTHON"]
        code = (
            "import sys; from optimum.onnxruntime import ORTModelForCausalLM as M; "
            "from transformers import AutoTokenizer as T; t = T.from_pretrained(sys.argv[1]); "
            "ids = t(sys.argv[2], return_tensors='pt').input_ids; model = M.from_pretrained(sys.argv[1]); "
            "print(t.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0]))"
        )
        done = subprocess.run([python, "-c", code, str(out), prompt], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = done.stdout.strip()
    else:
        genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
        model = genai.Model(str(out))
        tokenizer = genai.Tokenizer(model)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=24, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokenizer.encode(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        text = tokenizer.decode(generator.get_sequence(0))
    assert prompt in text and len(text) > len(prompt) + 10


def _check_engine(manifest: dict[str, Any], attention: int, cache: str) -> None:
    network = manifest["network"]
    assert network["attention"] == attention and manifest["attention"] == "fused"
    assert network["kv_cache_updates"] == (2 * attention if cache == "static" else 0)
    past = [t for t in network["inputs"] if t["name"].startswith("past_key_values.")]
    present = [t for t in network["outputs"] if t["name"].startswith("present.")]
    assert len(past) == len(present) == 2 * attention == 2 * len(manifest["kv_layers"])
    assert {t["dtype"] for t in (*past, *present)} == {"HALF"}
    assert network["weight_bytes"]["HALF"] > 0.95 * sum(network["weight_bytes"].values())
