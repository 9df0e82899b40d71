"""The bench on the GPU of this machine: graphs in the CUDA provider and, where they are built, engines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nbl_export import api

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


def test_a_bench_on_a_gpu(stories_out: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(stories_out, tmp_path / "own"))
    settings = api.BenchSettings((), ("eager",), (1, 2), (16,), 3, device="cuda")
    try:
        value = api.bench(own, settings)
    except api.NblError as error:
        pytest.skip(str(error))  # onnxruntime without CUDA
    names = {r.name for c in value.speed.cells for r in c.results}
    assert names >= {"base", "linearized", "PyTorch eager"}
    machine = value.speed.machine
    assert machine.device != "cpu" and machine.roofline and machine.roofline.device == machine.device
