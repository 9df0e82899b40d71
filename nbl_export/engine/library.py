"""Find the TensorRT libraries, what they can build for, and the NVIDIA GPUs of this machine.

``tensorrt`` builds on the GPU that will run the engine. ``tensorrt-rtx`` builds ahead of time, on any machine, for
the listed compute capabilities. Their Python API is the same; the differences are data in this module. GPUs are found
through the driver: no CUDA build of torch is needed.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.packages import part

# CUdevice_attribute, cuda.h: the major and the minor number of the compute capability
_CAPABILITY = (75, 76)
_DRIVER = "libcuda.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """A visible device: its name and its compute capability, as ``8.9``."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Gpus:
    """All visible devices, in the driver's order, and the bytes of memory of each.

    ``driver`` is what CUDA it is for, as ``for CUDA 12.8``; ``why_none`` is the reason where there is no device.
    """

    devices: tuple[Gpu, ...] = ()
    memory: tuple[int, ...] = ()
    driver: str = ""
    why_none: str = ""


def find_gpu() -> Gpu | None:
    """The first visible NVIDIA GPU, or None without a driver or a device."""
    return next(iter(find_gpus().devices), None)


def find_gpus() -> Gpus:
    """Every visible NVIDIA GPU, or why there is none."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return Gpus(why_none=f"no NVIDIA driver ({_DRIVER} does not load)")
    hidden = f"; {VISIBLE} is {os.environ[VISIBLE]!r}" if VISIBLE in os.environ else ""
    if code := driver.cuInit(0):
        error = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(error))
        said = (error.value or b"error %d" % code).decode(errors="replace")
        return Gpus(why_none=f"the NVIDIA driver does not start ({said}{hidden})")
    count, device, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    driver.cuDeviceGetCount(ctypes.byref(count))
    devices, memory = [], []
    for number in range(count.value):
        if driver.cuDeviceGet(ctypes.byref(device), number):
            continue  # one that cannot be asked
        name, version = ctypes.create_string_buffer(256), []
        driver.cuDeviceGetName(name, len(name), device)
        for attribute in _CAPABILITY:
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            version.append(str(value.value))
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        devices.append(Gpu(name.value.decode(errors="replace"), ".".join(version)))
        memory.append(size.value)
    if not devices:
        return Gpus(why_none=f"the NVIDIA driver shows no device{hidden}")
    driver.cuDriverGetVersion(ctypes.byref(value))
    cuda = f"for CUDA {value.value // 1000}.{value.value % 1000 // 10}"
    return Gpus(tuple(devices), tuple(memory), cuda)


# By package: of what release the oldest one is that serves.
_OLDEST = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 5)}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT library.

    ``package`` is its PyPI name. One that builds ``ahead_of_time``, without a GPU, compiles kernels at run time and
    captures CUDA graphs itself, since the caller cannot know when to.
    """

    package: str
    version: str
    module: Any
    ahead_of_time: bool

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def __reduce__(self) -> tuple[Any, ...]:
        return import_library, (self.package,)  # in another process

    @property
    def capabilities(self) -> dict[str, Any]:
        """The compute capabilities for ahead-of-time builds by name, ``{"SM86": …}``; empty if not supported."""
        known: dict[str, Any] = self.module.ComputeCapability.__members__ if self.ahead_of_time else {}
        names = [n for n in known if re.fullmatch(r"SM\d+", n)]
        return {name: known[name] for name in sorted(names, key=lambda n: int(n[2:]))}


def choose_library(choice: str, gpu: Gpu | None) -> Library:
    """The library for ``choice`` (auto, tensorrt or rtx) on a machine with this ``gpu``.

    ``auto`` is tensorrt if it is installed and there is a GPU, else rtx. Raises :class:`MissingDependencyError`
    with the pip command to run if no library can be used.
    """
    if choice == "tensorrt" and gpu is None:
        raise MissingDependencyError(
            "tensorrt builds on the GPU that runs the engine, and no NVIDIA GPU is visible: use --trt rtx "
            f"({part('tensorrt-rtx').pip}) to build ahead of time without one."
        )
    if choice == "auto" and gpu is not None:
        try:
            return import_library("tensorrt")
        except MissingDependencyError:
            pass
    library = import_library("tensorrt" if choice == "tensorrt" else "tensorrt-rtx")
    if choice == "auto" and gpu is not None and not runs_here(tuple(library.capabilities), gpu):
        raise MissingDependencyError(
            f"{library} does not build for this machine's {gpu.name} (compute capability "
            f"{gpu.compute_capability}): {part('tensorrt').pip}, or use --trt rtx to build for other GPUs."
        )
    return library


def import_library(package: str) -> Library:
    """Import one of the two; raises :class:`MissingDependencyError` if it is missing or too old."""
    own = part(package)
    try:
        module = importlib.import_module(own.module)
        version = str(module.__version__)
    except (ImportError, AttributeError, OSError) as error:  # OSError: its shared libraries do not load
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingDependencyError(f"{package} cannot be imported ({why}): {own.pip}.") from None
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < _OLDEST[package]:
        oldest = ".".join(map(str, _OLDEST[package]))
        raise MissingDependencyError(
            f"{package} {version} is too old, {oldest} or newer is needed: {own.pip}."
        )
    return Library(package, version, module, ahead_of_time=package == "tensorrt-rtx")


def check_capabilities(library: Library, wanted: Sequence[str]) -> tuple[str, ...]:
    """Names such as SM86 from user input (86, 8.6, sm86); an empty list means all from 8.0 on.

    Raises :class:`InputError` for a name that the library cannot build for.
    """
    known = library.capabilities
    if not library.ahead_of_time:
        if wanted:
            raise InputError(
                f"--sm is for building ahead of time with --trt rtx; {library} builds for the GPU of this machine."
            )
        return ()
    if not wanted:
        # Turing has no bfloat16 and no fused attention, so it must be requested.
        return tuple(name for name in known if int(name[2:]) >= 80)
    digits = {
        text: text.strip().upper().removeprefix("SM").removeprefix("_").replace(".", "") for text in wanted
    }
    for text, number in digits.items():
        if f"SM{number}" not in known:
            raise InputError(
                f"--sm {text.strip()!r} is unknown to {library}; it can build for {', '.join(known)}."
            )
    return tuple(dict.fromkeys(f"SM{number}" for number in digits.values()))


def runs_here(capabilities: Sequence[str], gpu: Gpu) -> bool:
    """Whether an engine built ahead of time for ``capabilities`` runs on ``gpu``."""
    return f"SM{gpu.compute_capability.replace('.', '')}" in capabilities
