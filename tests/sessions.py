"""Graphs run by onnxruntime alone, as a consumer does, without anything of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.fixtures_graph import pad_left


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


def decode(
    runner: Any, rows: Sequence[Any], past: Mapping[str, Any], pairs: Mapping[str, str], steps: int
) -> Iterator[dict[str, Any]]:
    """All outputs of a ragged prefill and of decode ``steps``; ``pairs`` are the outputs that caches come from."""
    inputs, outputs = ([v.name for v in values] for values in (runner.get_inputs(), runner.get_outputs()))
    ids, mask, positions = pad_left([row[: len(row) - steps] for row in rows])
    for step in range(steps + 1):
        if step:
            ids = np.array([[row[len(row) - steps + step - 1]] for row in rows], dtype=np.int64)
            mask, positions = np.c_[mask, np.ones_like(ids)], positions[:, -1:] + 1
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        found = dict(zip(outputs, runner.run(None, {n: feeds[n] for n in inputs}), strict=True))
        past = {old: found[new] for old, new in pairs.items()}
        yield found


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
