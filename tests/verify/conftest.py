"""Graphs of a finished run in every form, their cases measured piece by piece, and a clock that only tests move."""

from __future__ import annotations

import shutil
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from nbl_export.calibrate.text import CalibrationText, load_text
from nbl_export.engine.manifest import EngineFile
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Silent
from nbl_export.records import Check
from nbl_export.settings import VerifySettings
from nbl_export.verify.case import DecoderCase, Measurement
from nbl_export.verify.speed import ceiling, race
from nbl_export.workspace import Workspace
from tests.finished import Graphs
from tests.fixtures_graph import external_entry, plan_by_hand, tensors_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda _: None)
    for module in (ceiling, race):
        monkeypatch.setattr(module, "time", fake)
    return now


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every candidate of a race take the seconds that it says."""
    monkeypatch.setattr(race, "prefill_seconds", lambda prompt: (prompt.seconds["prefill"],))
    monkeypatch.setattr(race, "decode_seconds", lambda prompt, steps: (prompt.seconds["decode"],) * steps)
    monkeypatch.setattr(race, "_SETTLE", 0)


@pytest.fixture
def pair(stories_out: Path) -> tuple[Path, Path]:
    """The unmodified graph and the linearized one."""
    return stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"


@pytest.fixture(scope="module")
def text(stories_out: Path) -> CalibrationText:
    return load_text(Workspace.open(stories_out).text)


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


LAYERS = (0, 3)
PARITY = VerifySettings(decode_steps=4, quality=False, speed=False)


def case_of(
    graphs: Graphs,
    plan: Plan,
    text: CalibrationText,
    base: Path,
    linear: Path,
    settings: VerifySettings,
    engines: Sequence[EngineFile] = (),
) -> DecoderCase:
    built, tensors = tuple(engines), tensors_of(base, plan)
    return DecoderCase(graphs.model, plan, base, linear, settings, Silent(), text, built, tensors=tensors)


def checks(result: Measurement) -> dict[str, Check]:
    assert len({c.name for c in result.checks}) == len(result.checks)
    return {c.name: c for c in result.checks}


def changed(path: Path, folder: Path, dtype: str, factor: float) -> Path:
    """A copy of a graph, one of whose MLP weights is multiplied."""
    target = Path(shutil.copytree(path.parent, folder / "changed")) / path.name
    proto = onnx.load(str(path), load_external_data=False)
    name = min(t.name for t in proto.graph.initializer if sorted(t.dims) == [64, 172])
    offset, length = external_entry(target, name)
    data = target.with_name(target.name + ".data")
    raw = bytearray(data.read_bytes())
    weight = np.frombuffer(bytes(raw[offset : offset + length]), dtype) * np.dtype(dtype).type(factor)
    raw[offset : offset + length] = weight.tobytes()
    data.write_bytes(raw)
    return target


def with_fault(graph: Path, folder: Path, layer: str, name: str, factor: float) -> Path:
    """A copy of ``graph`` with one weight multiplied."""
    proto = onnx.load(str(graph))
    (tensor,) = [t for t in proto.graph.initializer if layer in t.name and name in t.name]
    value = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value * value.dtype.type(factor), tensor.name))
    onnx.save(proto, str(folder / "model.onnx"))
    return folder / "model.onnx"
