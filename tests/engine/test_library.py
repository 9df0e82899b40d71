"""Which TensorRT serves, what each can build for, and the manifest that binds an engine to what it is."""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbl_export.blocks import Mlp
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
    runs_here,
)
from nbl_export.engine.manifest import check_runs, load_manifest
from nbl_export.errors import InputError, MissingDependencyError, NblError
from nbl_export.packages import pip_line
from nbl_export.records import to_json
from nbl_export.settings.choices import LIBRARIES
from tests.finished import manifest_by_hand, save_manifest

ADA = Gpu("NVIDIA Test", "8.9")
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


def test_a_library_whose_shared_objects_do_not_load_is_a_missing_dependency(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open\\nsecond line')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match=r"\(libnvinfer\.so\.10: cannot open\)"):
        import_library("tensorrt")


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
    assert {"SM86", "SM89", "SM120"} <= set(rtx.capabilities), "the real one knows those of consumer GPUs"


def test_an_engine_runs_on_what_it_was_built_for() -> None:
    for capability, here in {"8.9": True, "8.6": False, "12.0": True, "12.1": False}.items():
        assert runs_here(("SM89", "SM120"), Gpu("NVIDIA Test", capability)) is here


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpus() == Gpus(why_none="no NVIDIA driver (libcuda.so.1 does not load)") and not find_gpu()


# manifests ----------------------------------------------------------------------------------------


ENGINE = random.Random(0).randbytes(1000)
HASHES = {"engine": hashlib.sha256(ENGINE).hexdigest(), "onnx": "1" * 64, "plan": "2" * 64}
MANIFEST = manifest_by_hand(size=len(ENGINE), hashes=HASHES, gpu="NVIDIA é", linear_layers=(2, Mlp(3)))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine with its manifest beside it."""
    path = tmp_path / "model.engine"
    path.write_bytes(ENGINE)
    save_manifest(path, MANIFEST)
    return path


def refused(engine: Path, *words: str) -> None:
    """One sentence that says what does not fit."""
    with pytest.raises(InputError) as caught:
        load_manifest(engine)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in (*words, "nbl-export build"):
        assert word in message, message


def test_what_is_saved_is_what_is_loaded(engine: Path) -> None:
    assert load_manifest(engine) == MANIFEST
    body = json.loads(engine.with_name("model.json").read_text())
    assert body.pop("format") == "nbl-export/engine/1" and len(body.pop("sha256")) == 64
    assert body == to_json(MANIFEST)


def test_another_byte_in_the_engine_is_refused(engine: Path) -> None:
    place = 500
    engine.write_bytes(ENGINE[:place] + bytes([ENGINE[place] ^ 1]) + ENGINE[place + 1 :])
    refused(engine, str(engine), "was changed", "SHA-256")
    engine.write_bytes(ENGINE[:place])
    refused(engine, "was changed")


def test_what_is_missing_or_cut_is_named(engine: Path) -> None:
    file = engine.with_name("model.json")
    file.write_bytes(file.read_bytes()[:-3])
    refused(engine, str(file), "damaged")
    file.unlink()
    refused(engine, str(file), "missing")
    engine.unlink()
    refused(engine, str(engine), "does not exist")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("profiles"), "damaged"),
        (lambda m: m.update(note="of a later release"), "damaged"),
        (lambda m: m.update(size="1000"), "damaged"),
        (lambda m: m["hashes"].pop("engine"), "SHA-256"),
    ],
)
def test_a_manifest_with_other_fields_is_refused(
    engine: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    """Changed and signed anew, as whoever wrote it differently would have."""
    file = engine.with_name("model.json")
    body = json.loads(file.read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    refused(engine, words)


@pytest.mark.parametrize(
    ("version", "gpu", "error", "words"),
    [
        ("1.7.1.116", ADA, None, ()),
        ("1.7.1.116", None, MissingDependencyError, ("no NVIDIA GPU",)),
        (None, ADA, MissingDependencyError, ("tensorrt-rtx", pip_line("rtx"))),
        ("1.7.1.117", ADA, InputError, ("1.7.1.116", "1.7.1.117", "nbl-export build")),
        ("1.7.1.116", Gpu("NVIDIA H100", "9.0"), InputError, ("SM86, SM89", "NVIDIA H100", "9.0")),
    ],
)
def test_where_it_runs(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    gpu: Gpu | None,
    error: type[NblError] | None,
    words: tuple[str, ...],
) -> None:
    module: Any = ModuleType("tensorrt_rtx") if version else None
    if version:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    if error is None:
        assert check_runs(manifest_by_hand(), gpu).module is module
        return
    with pytest.raises(error) as caught:
        check_runs(replace(manifest_by_hand()), gpu)
    assert all(word in str(caught.value) for word in words)
