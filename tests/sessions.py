"""Graphs run by onnxruntime alone, as a consumer does, without anything of the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest


def cpu_session(graph: Path | onnx.ModelProto | ir.Model, options: Any = None) -> Any:
    """An inference session of a file, or of a graph in memory; the test is skipped without onnxruntime."""
    ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'nbl-export[cpu]'")
    if isinstance(graph, ir.Model):
        graph = ir.to_proto(graph)
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_graph(graph: Path | onnx.ModelProto | ir.Model, feeds: Mapping[str, Any], options: Any = None) -> Any:
    """All outputs by name of a graph that takes exactly ``feeds``."""
    session = cpu_session(graph, options)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def empty_past(session: Any, rows: int, head_size: int | None = None) -> dict[str, Any]:
    """A cache of no tokens for each past input of ``session``; ``head_size`` where the graph does not say it."""
    return {
        i.name: np.zeros((rows, i.shape[1], 0, head_size or i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }


@pytest.fixture
def cuda_sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """onnxruntime says that it has CUDA; the value grows by what each session asks for, and all run on the CPU."""
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="needs onnxruntime: pip install 'nbl-export[cpu]'"
    )
    asked: list[Any] = []
    plain = onnxruntime.InferenceSession

    def make(source: Any, options: Any = None, *, providers: list[Any], **more: Any) -> Any:
        asked.append(providers)
        return plain(source, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    return asked
