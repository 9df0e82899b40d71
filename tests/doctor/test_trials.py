"""A package that is there and broken is said to be: each way of failing, and none of them ends who asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.doctor import trials
from nbl_export.doctor.trials import DRIVER, UNKNOWN, try_all, try_one, versions
from nbl_export.parts import ALWAYS, Part
from tests.listening import Notes

Module = Callable[[str, str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Makes a module of a name, before all others of the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return make


BROKEN = {
    "raises": (
        "raise ImportError('libx.so.1: cannot open\\nmore')",
        "failed (ImportError: libx.so.1: cannot open)",
    ),
    "lacks": ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
    "library": ("raise OSError('libnvinfer.so.10: no such file')", "libnvinfer.so.10: no such file"),
    "exits": ("import sys; sys.exit('no licence')", "failed (SystemExit: no licence)"),
    "ends": ("import os; os._exit(7)", "ended with exit code 7"),
    "aborts": ("import os; os.abort()", "died by SIGABRT"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "died by SIGSEGV"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_package_is_named_with_its_reason(module: Module, how: str) -> None:
    source, reason = BROKEN[how]
    assert reason in try_one(module(how, source)).error


def test_those_after_a_broken_one_are_tried(module: Module) -> None:
    names = ["json"]
    for how, (source, _) in BROKEN.items():
        names += [module(how, source), module(f"after_{how}", "print('noise', flush=True)")]
    listener = Notes()
    found = try_all(names, listener)
    assert {name for name, trial in found.items() if trial.error} - {DRIVER} == set(BROKEN)
    for how, (_, reason) in BROKEN.items():
        assert reason in found[how].error
    assert listener.tasks == [("Trying packages", len(names) + 1, "packages", 0)]
    assert sum(listener.advanced) == len(names) + 1


def test_what_fails_beside_another_and_works_alone_works(module: Module) -> None:
    module("first", "")
    module("shy", "import sys\nif 'first' in sys.modules: raise ImportError('not beside first')")
    found = try_all(["first", "shy"], Notes())
    assert not found["first"].error and not found["shy"].error


def test_one_that_hangs_is_given_up(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_SECONDS", 1.0)
    found = try_all([module("sleeps", "import time; time.sleep(600)"), "json"], Notes())
    assert found["sleeps"].error == "took longer than 1 s" and not found["json"].error


def test_torch_and_onnxruntime_compute() -> None:
    import onnxruntime
    import torch

    from nbl_export.models.load import fast_dtype

    found = try_all(["torch", "onnxruntime"], Notes())
    assert not found["torch"].error and not found["onnxruntime"].error
    assert found["torch"].facts["version"] == torch.__version__
    assert found["torch"].facts["fast"] == fast_dtype()
    assert bool(found["torch"].facts["no_gpu"]) is not torch.cuda.is_available()
    names = [f"{name}ExecutionProvider" for name in found["onnxruntime"].facts["providers"]]
    assert names == onnxruntime.get_available_providers()
    assert bool(found["onnxruntime"].facts["no_gpu"]) or "CUDAExecutionProvider" in names


FAKE = """
__version__ = "9.9"
class SessionOptions: pass
class InferenceSession:
    def __init__(self, graph, options, providers):
        self.providers = providers
        if "CUDAExecutionProvider" in providers and {cuda!r} == "raises": raise RuntimeError("no cudnn.\\nmore")
    def run(self, names, feeds):
        import numpy
        return [numpy.array({y})]
    def get_providers(self):
        return ["CPUExecutionProvider"] if {cuda!r} == "falls back" else self.providers
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
"""


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ("works", ""),
        ("falls back", "CUDAExecutionProvider does not start"),
        ("raises", "CUDAExecutionProvider does not start (no cudnn)"),
    ],
)
def test_a_provider_that_is_listed_is_started(module: Module, cuda: str, said: str) -> None:
    module("onnxruntime", FAKE.format(cuda=cuda, y="[[14, 26]]"))
    trial = try_one("onnxruntime")
    assert not trial.error and trial.facts["no_gpu"] == said
    assert trial.facts["providers"] == ["CUDA", "CPU"] and trial.facts["version"] == "9.9"


def test_a_runtime_that_computes_wrongly_does_not_work(module: Module) -> None:
    module("onnxruntime", FAKE.format(cuda="works", y="[[14, 27]]"))
    assert try_one("onnxruntime").error == "failed (RuntimeError: CPUExecutionProvider computes wrongly)"


def test_versions_are_those_of_what_is_there(module: Module, tmp_path: Path) -> None:
    info = tmp_path / "made_up-3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 3.2\n")
    module("by_hand", "")
    (tmp_path / "a_folder").mkdir()
    asked = [
        Part("made-up", "made_up", ALWAYS, "recorded"),
        Part("made-up-gpu", "made_up", ALWAYS, "the other one with its module"),
        Part("by-hand", "by_hand", ALWAYS, "a module without a record"),
        Part("a-folder", "a_folder", ALWAYS, "a folder of the user"),
        Part("nobody-has-this", "nobody_has_this", ALWAYS, "missing"),
    ]
    assert versions(asked) == {"made-up": "3.2", "by-hand": UNKNOWN}
