"""The product's main job on a real language model, as a user would do it: both caches, both engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LAYERS, K = 30, 12


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as scripts/test.sh fetches it."""
    path = Path(os.environ.get("NBL_EXPORT_SMOLLM2", ""))
    if not path.is_file():
        pytest.skip("needs SmolLM2: scripts/test.sh fetches it and sets NBL_EXPORT_SMOLLM2")
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx to build engines")
    return path


@pytest.fixture(scope="module")
def text(shared_data: Path) -> Path:
    return shared_data / "text" / "c4_exllamav2_118.jsonl.gz"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2") / "out"


@pytest.mark.parametrize("cache", ["static", "concat"])
def test_fp16_engines_with_fused_attention(smollm2: Path, text: Path, out: Path, cache: str) -> None:
    """One folder for both: the second run goes on from the first's calibration and plan."""
    command = [sys.executable, "-m", "nbl_export", str(smollm2), "--k", str(K), "-o", str(out)]
    command += ["--trt", "rtx", "--precision", "fp16", "--kv-cache", cache, "--no-quality"]
    command += ["--calibration", str(text), "--samples", "16", "--seq-len", "256", "--heldout-samples", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NBL_EXPORT_DEBUG": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report" / "report.json").read_text())
    checks = {c["name"]: c for c in report["checks"]}
    assert report["verdict"] == checks["parity"]["status"] == checks["engine build"]["status"] == "passed"
    assert report["graph"]["precision"] == "fp16" and report["graph"]["kv_cache"] == cache
    base, linear = report["engines"]
    _check_engine(base, LAYERS, cache)
    _check_engine(linear, LAYERS - K, cache)
    assert base["profiles"] and [p["name"] for p in base["profiles"]] == ["prefill", "decode"]
    # Per layer: q and o [576, 576], k and v [576, 192] in half go, W [576, 576] and b [576] come.
    removed = 2 * K * (2 * 576 * 576 + 2 * 576 * 192 - 576 * 576 - 576)
    weights = [sum(e["network"]["weight_bytes"].values()) for e in (base, linear)]
    assert weights[0] - weights[1] == pytest.approx(removed, rel=0.01)
    assert base["size"] - linear["size"] > 0.95 * removed
    run = checks["engine run"]
    if run["status"] == "skipped":
        assert "ahead of time for SM80, SM86, SM89" in run["detail"] and "not run" in run["detail"]


def _check_engine(manifest: dict[str, Any], attention: int, cache: str) -> None:
    network = manifest["network"]
    assert network["attention"] == attention and manifest["attention"] == "fused"
    assert network["kv_cache_updates"] == (2 * attention if cache == "static" else 0)
    past = [t for t in network["inputs"] if t["name"].startswith("past_key_values.")]
    present = [t for t in network["outputs"] if t["name"].startswith("present.")]
    assert len(past) == len(present) == 2 * attention == 2 * len(manifest["kv_layers"])
    assert {t["dtype"] for t in (*past, *present)} == {"HALF"}
    assert network["weight_bytes"]["HALF"] > 0.95 * sum(network["weight_bytes"].values())
