"""What is said of the machine is true of this one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from nbl_export.doctor.machine import Place, this_machine
from nbl_export.doctor.trials import DRIVER, Trial
from nbl_export.engine.gpu import Gpu, Gpus

NONE = {DRIVER: Trial(facts=asdict(Gpus(why_none="no NVIDIA driver")))}


def test_it_is_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = this_machine(NONE)
    assert found.executable == sys.executable and found.python == sys.version.split()[0]
    assert found.memory == psutil.virtual_memory().total
    assert found.memory_free is not None and 0 < found.memory_free <= found.memory
    assert found.here.folder == str(tmp_path) and found.temporary.folder == tempfile.gettempdir()
    free = shutil.disk_usage(tmp_path).free
    assert found.here.free is not None and abs(found.here.free - free) < free / 2
    assert found.all_cores == os.cpu_count() and 1 <= found.cores <= found.all_cores
    assert found.bf16 is None and found.no_gpu == {DRIVER: "no NVIDIA driver"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_that_may_be_used() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert this_machine(NONE).cores == 1
    finally:
        os.sched_setaffinity(0, before)


def test_what_the_trials_found() -> None:
    gpus = Gpus((Gpu("NVIDIA H100", "9.0"),), (80 << 30,), "570.86")
    trials = {
        DRIVER: Trial(facts=asdict(gpus)),
        "torch": Trial(facts={"fast": "bfloat16", "no_gpu": "a build without CUDA"}),
        "onnxruntime": Trial(facts={"no_gpu": ""}),
    }
    found = this_machine(trials)
    assert (found.gpus, found.gpu_memory, found.driver) == (gpus.devices, gpus.memory, "570.86")
    assert found.bf16 is True and found.no_gpu == {"torch": "a build without CUDA"}
    trials["torch"] = Trial(facts={"fast": "float32"})
    assert this_machine(trials).bf16 is False


def test_a_driver_that_crashes_is_no_gpu() -> None:
    found = this_machine({DRIVER: Trial("died by SIGSEGV"), "torch": Trial("failed (ImportError: x)")})
    assert found.gpus == () and found.no_gpu == {DRIVER: "it died by SIGSEGV"} and found.bf16 is None


def test_a_folder_that_is_gone_and_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    found = this_machine(NONE)
    assert found.here == found.temporary == Place("", None)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "never"))
    assert this_machine(NONE).temporary == Place(str(tmp_path / "never"), None)


def test_without_psutil_memory_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = this_machine(NONE)
    assert found.memory is None and found.memory_free is None
