"""What this machine has: processor, memory, disk, GPUs."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbl_export.doctor.trials import DRIVER, Trial
from nbl_export.engine.gpu import Gpu, Gpus
from nbl_export.machine import cores
from nbl_export.records import from_json
from nbl_export.report.schema import processor

BF16 = "bfloat16"


@dataclass(frozen=True)
class Place:
    """A folder, and the bytes that are free there; None where it cannot be asked."""

    folder: str
    free: int | None


@dataclass(frozen=True)
class Machine:
    """Memory and disk in bytes.

    ``cores`` are those that this process may use, of ``all_cores``. ``bf16`` is whether the CPU multiplies bfloat16 as
    such; None where torch does not say. ``driver`` and ``gpu_memory`` are those of ``gpus``; ``no_gpu`` has a reason
    for each of the driver, torch and onnxruntime that uses no GPU. ``encoding`` is that of file names and texts.
    """

    python: str
    executable: str
    system: str
    processor: str
    cores: int
    all_cores: int
    memory: int | None
    memory_free: int | None
    here: Place
    temporary: Place
    bf16: bool | None
    gpus: tuple[Gpu, ...]
    gpu_memory: tuple[int, ...]
    driver: str
    no_gpu: Mapping[str, str]
    encoding: str


def this_machine(trials: Mapping[str, Trial]) -> Machine:
    """This machine, with what ``trials`` of the driver, torch and onnxruntime found out."""
    found, no_gpu = _gpus(trials[DRIVER])
    total, free = _memory()
    for name in ("torch", "onnxruntime"):
        if name in trials and (why := trials[name].facts.get("no_gpu")):
            no_gpu[name] = why
    fast = trials["torch"].facts.get("fast") if "torch" in trials else None
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        cores=cores(),
        all_cores=os.cpu_count() or 1,
        memory=total,
        memory_free=free,
        here=_place(os.getcwd),
        temporary=_place(tempfile.gettempdir),
        bf16=None if fast is None else fast == BF16,
        gpus=found.devices,
        gpu_memory=found.memory,
        driver=found.driver,
        no_gpu=no_gpu,
        encoding=locale.getpreferredencoding(False),
    )


def _gpus(trial: Trial) -> tuple[Gpus, dict[str, str]]:
    if trial.error:
        return Gpus(), {DRIVER: f"it {trial.error}"}
    found = from_json(Gpus, trial.facts, DRIVER, "try again")
    return found, ({DRIVER: found.why_none} if found.why_none else {})


def _memory() -> tuple[int | None, int | None]:
    try:
        import psutil

        memory = psutil.virtual_memory()
    except (ImportError, OSError):  # that psutil is missing is said where the packages are
        return None, None
    return memory.total, memory.available


def _place(find: Callable[[], str]) -> Place:
    try:
        folder = find()
    except OSError:  # deleted, or none that can be written to
        return Place("", None)
    try:
        return Place(folder, shutil.disk_usage(Path(folder)).free)
    except OSError:
        return Place(folder, None)
