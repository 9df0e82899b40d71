"""Which TensorRT serves: every choice on every machine, with fake modules and drivers; what each can build for."""

from __future__ import annotations

import ctypes
import re
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbl_export.engine.library import (
    VISIBLE,
    Gpu,
    Gpus,
    Library,
    check_capabilities,
    choose_library,
    find_gpu,
    find_gpus,
    import_library,
    library_of,
    runs_here,
)
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.packages import pip_line
from nbl_export.settings.choices import LIBRARIES

ADA = Gpu("NVIDIA Test", "8.9")
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
HERE = {"tensorrt": "11.4.0.12", "rtx": "1.7.1.116"}
OLD = {"tensorrt": "10.14.1", "rtx": "1.4.9"}
# In the order of a release that put new ones last.
_Capability = IntEnum("_Capability", "NONE CURRENT SM120 SM75 SM89 SM80 SM121 SM86")


def fake(name: str, version: str) -> ModuleType:
    module: Any = ModuleType(name)
    module.__version__, module.ComputeCapability = version, _Capability
    return module


def install(patch: pytest.MonkeyPatch, kind: str, version: str | None) -> None:
    module = MODULES[kind]
    patch.setitem(sys.modules, module, fake(module, version) if version else None)


@pytest.mark.parametrize("gpu", [ADA, None], ids=["gpu", "no gpu"])
@pytest.mark.parametrize("choice", LIBRARIES)
def test_every_choice_on_every_machine(monkeypatch: pytest.MonkeyPatch, choice: str, gpu: Gpu | None) -> None:
    for tensorrt in (HERE["tensorrt"], OLD["tensorrt"], None):
        for rtx in (HERE["rtx"], OLD["rtx"], None):
            install(monkeypatch, "tensorrt", tensorrt)
            install(monkeypatch, "rtx", rtx)
            usable = {"tensorrt": gpu and tensorrt == HERE["tensorrt"], "rtx": rtx == HERE["rtx"]}
            if wanted := next((k for k in MODULES if choice in ("auto", k) and usable[k]), None):
                library = choose_library(choice, gpu)
                assert library.module is sys.modules[MODULES[wanted]]
                assert library.ahead_of_time == (wanted == "rtx")
                assert str(library) == f"{MODULES[wanted].replace('_', '-')} {HERE[wanted]}"
                continue
            with pytest.raises(MissingDependencyError) as caught:
                choose_library(choice, gpu)
            assert pip_line("trt" if choice == "tensorrt" and gpu else "rtx") in str(caught.value)
            if choice == "tensorrt" and gpu is None:
                assert "no NVIDIA GPU" in str(caught.value) and "--trt rtx" in str(caught.value)


def test_auto_does_not_build_engines_that_this_gpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a data-centre GPU, which rtx does not serve; who says rtx builds for other machines."""
    install(monkeypatch, "tensorrt", None)
    install(monkeypatch, "rtx", HERE["rtx"])
    hopper = Gpu("NVIDIA H100", "9.0")
    with pytest.raises(
        MissingDependencyError, match=rf"H100 .*9\.0.*{re.escape(pip_line('trt'))}.*--trt rtx"
    ):
        choose_library("auto", hopper)
    assert choose_library("rtx", hopper).package == "tensorrt-rtx"


@pytest.mark.parametrize("kind", MODULES)
def test_the_pip_line_installs_what_is_accepted(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    install(monkeypatch, kind, None)
    with pytest.raises(MissingDependencyError, match="cannot be imported") as caught:
        import_library(kind)
    (extra,) = re.findall(r"pip install .*\[(\w+)\]'", str(caught.value))
    package = MODULES[kind].replace("_", "-")
    line = re.search(rf'^{extra} = \[.*"{package}>=([\d.]+)', PYPROJECT.read_text(), re.MULTILINE)
    assert line is not None, str(caught.value)
    for version in (line[1], "100.0"):  # numbers are compared as numbers
        install(monkeypatch, kind, version)
        assert import_library(kind).version == version, "pip may install what is then refused"
    install(monkeypatch, kind, OLD[kind])
    with pytest.raises(MissingDependencyError, match=rf"{OLD[kind]} is too old.*pip install"):
        import_library(kind)


def test_a_library_whose_shared_objects_do_not_load_is_a_missing_dependency(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open\\nsecond line')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match=r"\(libnvinfer\.so\.10: cannot open\)"):
        import_library("tensorrt")


def test_a_library_is_found_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "rtx", HERE["rtx"])
    assert library_of("tensorrt-rtx").module is sys.modules["tensorrt_rtx"]
    with pytest.raises(InputError, match="'openvino'"):
        library_of("openvino")


AHEAD = Library("tensorrt-rtx", "1.7.1", fake("tensorrt_rtx", "1.7.1"), ahead_of_time=True)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        *(([text], ("SM86",)) for text in ("86", "8.6", "sm86", "SM_86", " 86 ")),
        (["8.6", "sm86", "89", "86"], ("SM86", "SM89")),
        ([], ("SM80", "SM86", "SM89", "SM120", "SM121")),  # from 8.0 on, in order
    ],
)
def test_capabilities_by_every_name(wanted: list[str], names: tuple[str, ...]) -> None:
    assert check_capabilities(AHEAD, wanted) == names


@pytest.mark.parametrize("text", ["90", "", "CURRENT", "smsm86", "-86"])
def test_an_unknown_capability_is_refused_with_all_there_are(text: str) -> None:
    with pytest.raises(InputError, match=f"--sm {text!r}.*SM75, SM80, SM86, SM89, SM120, SM121"):
        check_capabilities(AHEAD, ["86", text])


def test_capabilities_are_of_no_use_to_tensorrt(rtx: Library) -> None:
    own = Library("tensorrt", "11.4", fake("tensorrt", "11.4"), ahead_of_time=False)
    assert check_capabilities(own, []) == () and own.capabilities == {}
    with pytest.raises(InputError, match=r"--sm .*--trt rtx; tensorrt 11\.4"):
        check_capabilities(own, ["86"])
    # The real one knows those of consumer GPUs.
    members = rtx.module.ComputeCapability.__members__
    assert {"SM86", "SM89", "SM120"} <= set(rtx.capabilities)
    assert all(rtx.capabilities[n] == members[n] for n in rtx.capabilities)


def test_an_engine_runs_on_what_it_was_built_for() -> None:
    for capability, here in {"8.9": True, "8.6": False, "12.0": True, "12.1": False}.items():
        assert runs_here(("SM89", "SM120"), Gpu("NVIDIA Test", capability)) is here


# GPUs ---------------------------------------------------------------------------------------------


class Driver:
    """libcuda and libnvidia-ml as ctypes shows them: results are error codes, values come back by reference."""

    names: tuple[bytes, ...] = (b"NVIDIA A", b"caf\xe9 GPU")
    version: bytes | None = b"570.86.15"
    code = 0

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(self.names)

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 7 + ordinal  # the driver's handle is not the ordinal
        return 0

    def cuDeviceGetName(self, buffer: Any, length: int, device: Any) -> None:
        assert length == len(buffer)
        buffer.value = self.names[device.value - 7]

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
        value._obj.value = {75: 9, 76: device.value - 7}[attribute]

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> None:
        size._obj.value = (device.value - 6) << 36  # more than 32 bits hold

    def cuGetErrorName(self, code: int, name: Any) -> None:
        name._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}.get(code)

    def cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 12080

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        assert self.version is not None and length == len(text) == 80
        text.value = self.version
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()

    def load(name: str) -> Driver:
        if name == "libnvidia-ml.so.1" and found.version is None:
            raise OSError(f"{name}: cannot open shared object file")
        assert name in ("libcuda.so.1", "libnvidia-ml.so.1")
        return found

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delenv(VISIBLE, raising=False)
    return found


def test_every_device_has_its_memory(driver: Driver) -> None:
    devices = (Gpu("NVIDIA A", "9.0"), Gpu("caf\ufffd GPU", "9.1"))
    assert find_gpus() == Gpus(devices, (1 << 36, 2 << 36), "570.86.15") and find_gpu() == devices[0]
    driver.version = None
    assert find_gpus().driver == "for CUDA 12.8"


def test_why_there_is_none(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.names = ()
    assert find_gpus() == Gpus(why_none="the NVIDIA driver shows no device") and find_gpu() is None
    driver.code = 100
    assert find_gpus().why_none == "the NVIDIA driver does not start (CUDA_ERROR_NO_DEVICE)"
    monkeypatch.setenv(VISIBLE, "")
    assert find_gpus().why_none.endswith("(CUDA_ERROR_NO_DEVICE; CUDA_VISIBLE_DEVICES is '')")

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpus() == Gpus(why_none="no NVIDIA driver (libcuda.so.1 does not load)")
