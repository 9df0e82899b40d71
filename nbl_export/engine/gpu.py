"""The NVIDIA GPU of this machine, found through the driver: no CUDA build of torch is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# CUdevice_attribute, cuda.h
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """A visible device: its name and its compute capability, as ``8.9``."""

    name: str
    compute_capability: str


def find_gpu() -> Gpu | None:
    """The first visible NVIDIA GPU, or None without a driver or a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    version = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        version.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(version))
