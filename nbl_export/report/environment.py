"""On what a report's figures were measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "lm-eval",
    "datasets",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "scipy",
    "pillow",
)


@dataclass(frozen=True)
class Environment:
    """Python, operating system, processor, memory and package versions; nothing that names the machine."""

    python: str
    system: str
    processor: str
    cores: int | None
    memory_gib: float
    packages: Mapping[str, str]


def environment() -> Environment:
    """This machine."""
    import psutil

    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        cores=os.cpu_count(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        packages={name: found for name in _PACKAGES if (found := _version(name))},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
