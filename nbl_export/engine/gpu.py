"""The NVIDIA GPUs of this machine, found through the driver: no CUDA build of torch is needed."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

# CUdevice_attribute, cuda.h
_MAJOR, _MINOR = 75, 76
_DRIVER, _MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """A visible device: its name and its compute capability, as ``8.9``."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Gpus:
    """All visible devices, in the driver's order, and the bytes of memory of each.

    ``driver`` is its version, as ``570.86.15``, or what CUDA it is for; ``why_none`` is the reason where there is no
    device.
    """

    devices: tuple[Gpu, ...] = ()
    memory: tuple[int, ...] = ()
    driver: str = ""
    why_none: str = ""


def find_gpu() -> Gpu | None:
    """The first visible NVIDIA GPU, or None without a driver or a device."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    found = _device(driver, 0)
    return found[1] if found else None


def find_gpus() -> Gpus:
    """Every visible NVIDIA GPU, or why there is none."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return Gpus(why_none=f"no NVIDIA driver ({_DRIVER} does not load)")
    if code := driver.cuInit(0):
        return Gpus(why_none=f"the NVIDIA driver does not start ({_error(driver, code)}{_hidden()})")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = [one for number in range(count.value) if (one := _device(driver, number))]
    if not found:
        return Gpus(why_none=f"the NVIDIA driver shows no device{_hidden()}")
    memory = []
    for handle, _ in found:
        size = ctypes.c_size_t()
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        memory.append(size.value)
    return Gpus(tuple(gpu for _, gpu in found), tuple(memory), _version(driver))


def _device(driver: Any, number: int) -> tuple[ctypes.c_int, Gpu] | None:
    """The handle and the description of a device; None for one that cannot be asked."""
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), number):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    version = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        version.append(str(value.value))
    return device, Gpu(name.value.decode(errors="replace"), ".".join(version))


def _version(driver: Any) -> str:
    """That of the driver, which only the management library says; else of the CUDA that it is for."""
    try:
        management: Any = ctypes.CDLL(_MANAGEMENT)
        text = ctypes.create_string_buffer(80)
        if not management.nvmlInit_v2() and not management.nvmlSystemGetDriverVersion(text, len(text)):
            return text.value.decode(errors="replace")
    except (OSError, AttributeError):
        pass
    cuda = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(cuda))
    return f"for CUDA {cuda.value // 1000}.{cuda.value % 1000 // 10}"


def _error(driver: Any, code: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return (name.value or b"error %d" % code).decode(errors="replace")


def _hidden() -> str:
    """What may hide devices from this process."""
    return f"; {VISIBLE} is {os.environ[VISIBLE]!r}" if VISIBLE in os.environ else ""
