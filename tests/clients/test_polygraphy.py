"""Polygraphy builds an engine from our graph as it stands, without our code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.export.torch import save_in_precision, trace
from nbl_export.graph.precision import PRECISIONS
from tests import tiny
from tests.fixtures_graph import load

pytestmark = pytest.mark.client


def test_polygraphy_builds_an_exported_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    tool = shutil.which("polygraphy", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs polygraphy")
    # Polygraphy insists on fused attention, which has kernels for four heads of 64, not for smaller ones.
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = load(tiny.build(tmp_path / "model", **sizes))
    graph, engine = tmp_path / "graph" / "model.onnx", tmp_path / "model.engine"
    save_in_precision(trace(model), graph, PRECISIONS["bf16"], [])
    done = subprocess.run(
        [tool, "convert", str(graph), "--convert-to", "trt", "-o", str(engine)],
        capture_output=True,
        text=True,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert engine.stat().st_size > graph.with_name("model.onnx.data").stat().st_size / 2
