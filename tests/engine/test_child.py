"""Engines built in a child process: the same engine, and what a broken library costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nbl_export import api
from nbl_export.engine import child as module
from nbl_export.engine.child import build_in_child
from nbl_export.engine.library import Library
from nbl_export.engine.profiles import Limits
from nbl_export.errors import BuildError, InputError
from tests.engine.conftest import Graphs
from tests.listening import Notes

LIMITS = Limits(1, 8, 32)
SETTINGS = api.EngineSettings("rtx", max_batch=1, max_seq=8, max_context=32, sm=("86",))


def test_the_engine_its_facts_and_the_progress_come_back(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path
) -> None:
    path, engine, task = graphs("fp16", "static").linearized, tmp_path / "model.engine", Notes()
    before = {p.name for p in path.parent.iterdir()}
    built = build_in_child(rtx, path, 3, LIMITS, ("SM86",), engine, tmp_path / "timing.cache", task)
    assert built.size == engine.stat().st_size > 100_000
    assert sum(task.advanced) == 1000 and len(task.advanced) > 5
    assert built.facts.attention == 3 and built.facts.weight_bytes["HALF"] > 400_000
    assert len(built.weights.attention) == 3 and len(built.weights.named) > 20
    assert [p.name for p in built.profiles] == ["prefill", "decode"]
    assert {p.name for p in path.parent.iterdir()} == before
    assert list(tmp_path.iterdir()) == [engine]


def test_what_is_refused_there_is_refused_here(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path
) -> None:
    path = graphs("fp16", "static").linearized
    with pytest.raises(BuildError, match=r"^The TensorRT network has 6 KV inputs, expected 4\.$"):
        build_in_child(rtx, path, 2, LIMITS, ("SM86",), tmp_path / "e", tmp_path / "t", Notes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"model\.onnx"):
        build_in_child(rtx, tmp_path / "model.onnx", 2, LIMITS, (), tmp_path / "e", tmp_path / "t", Notes())


BROKEN = {
    "crashes": ("import ctypes; ctypes.string_at(0)", "died by SIGSEGV"),
    "aborts": ("import os, sys; print('terminate called', file=sys.stderr); os.abort()", "died by SIGABRT"),
    "hangs": ("import time; time.sleep(600)", "made no progress in 2 s"),
    "exits": ("import os; os.write(2, b'no license\\n'); os._exit(3)", "ended with exit code 3 (no license)"),
    "raises": ("raise RuntimeError('of the binding')", "failed (RuntimeError: of the binding)"),
    "is out of memory": ("raise MemoryError", "ran out of memory"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_breaks_costs_a_sentence(
    built_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """One that the child alone imports; the engines of before stay, and nothing else does."""
    code, said = BROKEN[how]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tensorrt_rtx.py").write_text(
        f"__version__ = '1.7.1'\nclass ILogger:\n    {code}\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "broken")
    if how == "hangs":  # the others end by themselves, on a busy machine after more than two seconds
        monkeypatch.setattr(module, "PATIENCE", 2)
    before = {p: p.read_bytes() for p in built_copy.rglob("*") if p.is_file()}
    with pytest.raises(BuildError) as caught:
        api.build(built_copy, SETTINGS)
    message = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in message
    graph = built_copy / "baseline" / "model.onnx"
    assert message.startswith(f"The build of an engine of {graph} with tensorrt-rtx 1."), message
    assert f" {said}: " in message and message.endswith("--precision.")
    assert {p: p.read_bytes() for p in built_copy.rglob("*") if p.is_file()} == before
    assert psutil.Process().children() == []
