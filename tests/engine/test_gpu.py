"""Asking the driver: fakes of it, with and without devices."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from nbl_export.engine.gpu import VISIBLE, Gpu, Gpus, find_gpu, find_gpus

# What the driver calls its first device; not the ordinal.
_HANDLE = 7
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class Driver:
    """libcuda as ctypes shows it: integers come back through references, results are error codes."""

    def __init__(self, name: bytes = b"NVIDIA Test 1", capability: tuple[int, int] = (8, 9)) -> None:
        self.name, self.capability = name, capability
        self.devices = 1
        self.failing: str | None = None
        self.calls: list[str] = []

    def _code(self, call: str) -> int:
        assert self.calls or call == "cuInit", "the driver is asked before it is initialized"
        self.calls.append(call)
        return _NO_DEVICE if call == self.failing else 0

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._code("cuInit")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return self._code("cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        assert ordinal == 0
        device._obj.value = _HANDLE
        return self._code("cuDeviceGet")

    def cuDeviceGetName(self, buffer: Any, length: int, device: Any) -> int:
        assert device.value == _HANDLE and length == len(buffer)
        buffer.value = self.name
        return self._code("cuDeviceGetName")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert device.value == _HANDLE
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
        value._obj.value = {75: self.capability[0], 76: self.capability[1]}[attribute]
        return self._code("cuDeviceGetAttribute")


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"  # without the number it is the developer's package
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    return driver


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpu() is None


@pytest.mark.parametrize(
    ("capability", "text"), [((8, 9), "8.9"), ((7, 5), "7.5"), ((12, 0), "12.0"), ((12, 1), "12.1")]
)
def test_the_first_device_is_described(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], text: str
) -> None:
    driver = use(monkeypatch, Driver(b"NVIDIA RTX 9000 Laptop GPU", capability))
    driver.devices = 3
    assert find_gpu() == Gpu("NVIDIA RTX 9000 Laptop GPU", text)


def test_a_driver_without_devices_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver())
    driver.devices = 0
    assert find_gpu() is None
    assert "cuDeviceGet" not in driver.calls


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGet"])
def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """CUDA_VISIBLE_DEVICES without any, a container without the devices, a device that is lost."""
    driver = use(monkeypatch, Driver())
    driver.failing = call
    assert find_gpu() is None
    assert driver.calls[-1] == call, "a driver that failed is asked no more"


def test_a_name_that_is_no_text_still_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Driver(b"caf\xe9 GPU"))
    gpu = find_gpu()
    assert gpu is not None
    assert gpu.name.startswith("caf") and gpu.name.endswith(" GPU")


# all of them ---------------------------------------------------------------------------------------


class Several(Driver):
    """A driver with devices of different memory, whose management library may be missing."""

    def __init__(self, names: list[bytes], version: bytes | None = b"570.86.15") -> None:
        super().__init__()
        self.names, self.version, self.devices = names, version, len(names)

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = _HANDLE + ordinal
        return self._code("cuDeviceGet")

    def cuDeviceGetName(self, buffer: Any, length: int, device: Any) -> int:
        buffer.value = self.names[device.value - _HANDLE]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 9, 76: device.value - _HANDLE}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        size._obj.value = (device.value - _HANDLE + 1) << 36  # more than 32 bits hold
        return 0

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}.get(code)
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12080
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        assert (
            self.version is not None and length == len(text) == 80
        )  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        text.value = self.version
        return 0


def use_all(monkeypatch: pytest.MonkeyPatch, driver: Several) -> Several:
    def load(name: str) -> Several:
        if name == "libnvidia-ml.so.1" and driver.version is None:
            raise OSError(f"{name}: cannot open shared object file")
        assert name in ("libcuda.so.1", "libnvidia-ml.so.1")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    return driver


def test_every_device_has_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    use_all(monkeypatch, Several([b"NVIDIA A", b"NVIDIA B"]))
    assert find_gpus() == Gpus(
        (Gpu("NVIDIA A", "9.0"), Gpu("NVIDIA B", "9.1")), (1 << 36, 2 << 36), "570.86.15"
    )
    assert find_gpu() == Gpu("NVIDIA A", "9.0")


def test_without_the_management_library_the_driver_is_known_by_its_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_all(monkeypatch, Several([b"NVIDIA A"], version=None))
    assert find_gpus().driver == "for CUDA 12.8"


def test_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    driver = use_all(monkeypatch, Several([]))
    assert find_gpus() == Gpus(why_none="the NVIDIA driver shows no device")
    driver.failing = "cuInit"
    assert find_gpus().why_none == "the NVIDIA driver does not start (CUDA_ERROR_NO_DEVICE)"
    monkeypatch.setenv(VISIBLE, "")
    assert find_gpus().why_none.endswith("(CUDA_ERROR_NO_DEVICE; CUDA_VISIBLE_DEVICES is '')")

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpus() == Gpus(why_none="no NVIDIA driver (libcuda.so.1 does not load)")
