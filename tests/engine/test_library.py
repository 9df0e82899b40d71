"""Which TensorRT serves: every choice on every machine, with fake modules; what each can build for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbl_export.engine.gpu import Gpu
from nbl_export.engine.library import (
    Library,
    check_capabilities,
    choose_library,
    import_library,
    library_of,
    runs_here,
)
from nbl_export.errors import InputError, MissingDependencyError, NblError
from nbl_export.packages import pip_line
from nbl_export.settings.choices import LIBRARIES

ADA = Gpu("NVIDIA Test", "8.9")
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
VERSIONS = {
    ("tensorrt", "here"): "11.4.0.12",
    ("tensorrt", "old"): "9.3.0",
    ("rtx", "here"): "1.7.1.116",
    ("rtx", "old"): "1.4.0.76",
}


# In the order of a release that put new ones last.
_Capability = IntEnum("_Capability", "NONE CURRENT SM120 SM75 SM89 SM80 SM121 SM86")


def fake(name: str, version: str) -> ModuleType:
    module: Any = ModuleType(name)
    module.__version__, module.ComputeCapability = version, _Capability
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Called with tensorrt or rtx and a state: here, old, absent, broken, or the source of its package."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(kind: str, state: str) -> None:
        name = MODULES[kind]
        monkeypatch.setitem(sys.modules, name, None)  # what is imported meanwhile is forgotten afterwards
        if state == "absent":
            return
        if (kind, state) in VERSIONS:
            monkeypatch.setitem(sys.modules, name, fake(name, VERSIONS[kind, state]))
        else:
            del sys.modules[name]
            broken = "raise OSError('libnvinfer.so: cannot open shared object file\\nmore')"
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(broken if state == "broken" else state)

    return make


def refusal(work: Callable[[], object], error: type[NblError], code: int, *words: str) -> str:
    """What ``work`` is refused with: one sentence on one line, with these words in it."""
    with pytest.raises(error) as caught:
        work()
    assert type(caught.value) is error
    message = str(caught.value)
    assert caught.value.exit_code == code
    assert "\n" not in message and message.endswith(".") and not message.endswith("..")
    assert not re.search(r"\.\s+[A-Z]", message), f"two sentences: {message}"
    for word in words:
        assert word in message, message
    return message


# choose ------------------------------------------------------------------------------------------

STATES = ("here", "old", "absent", "broken")


@pytest.mark.parametrize("rtx", STATES)
@pytest.mark.parametrize("tensorrt", STATES)
@pytest.mark.parametrize("gpu", [ADA, None], ids=["gpu", "no gpu"])
@pytest.mark.parametrize("choice", LIBRARIES)
def test_every_choice_on_every_machine(
    install: Callable[[str, str], None], choice: str, gpu: Gpu | None, tensorrt: str, rtx: str
) -> None:
    install("tensorrt", tensorrt)
    install("rtx", rtx)
    usable = {"tensorrt": gpu is not None and tensorrt == "here", "rtx": rtx == "here"}
    wanted = next(
        (k for k in ("tensorrt", "rtx") if choice in ("auto", k) and usable[k]),
        None,
    )
    if wanted:
        library = choose_library(choice, gpu)
        assert library.module is sys.modules[MODULES[wanted]]
        assert library.ahead_of_time == (wanted == "rtx")
        assert library.package == {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}[wanted]
        assert str(library) == f"{library.package} {VERSIONS[wanted, 'here']}"
        return
    message = refusal(lambda: choose_library(choice, gpu), MissingDependencyError, 3)
    if choice == "tensorrt" and gpu is not None:
        assert pip_line("trt") in message
    else:
        assert pip_line("rtx") in message
    if choice == "tensorrt" and gpu is None:
        assert "no NVIDIA GPU" in message and "--trt rtx" in message


def test_auto_does_not_build_engines_that_this_gpu_cannot_run(install: Callable[[str, str], None]) -> None:
    """On a data-centre GPU, which rtx does not serve; who says rtx builds for other machines."""
    install("tensorrt", "absent")
    install("rtx", "here")
    hopper = Gpu("NVIDIA H100", "9.0")
    words = ("H100", "9.0", pip_line("trt"), "--trt rtx")
    refusal(lambda: choose_library("auto", hopper), MissingDependencyError, 3, *words)
    assert choose_library("rtx", hopper).package == "tensorrt-rtx"
    install("tensorrt", "here")
    assert choose_library("auto", hopper).package == "tensorrt"


def test_an_unknown_choice_is_bad_usage() -> None:
    refusal(lambda: choose_library("foo", ADA), InputError, 2, "'foo'", "auto, tensorrt, rtx")


# import ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensorrt", "rtx"])
def test_the_pip_line_installs_what_is_accepted(
    install: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    install(kind, "absent")
    message = refusal(lambda: import_library(kind), MissingDependencyError, 3)
    (extra,) = re.findall(r"pip install .*\[(\w+)\]'", message)
    package = MODULES[kind].replace("_", "-")
    line = re.search(rf'^{extra} = \[.*"{package}>=([\d.]+)', PYPROJECT.read_text(), re.MULTILINE)
    assert line is not None, message
    monkeypatch.setitem(sys.modules, MODULES[kind], fake(MODULES[kind], line[1]))
    assert import_library(kind).version == line[1], "pip may install what is then refused"


@pytest.mark.parametrize(
    "source",
    [
        "raise OSError('libnvinfer.so.10: cannot open shared object file\\nsecond line')",
        "raise ImportError('DLL load failed')",
        "raise ImportError('its reason ends with a full stop.')",
        "raise ImportError",
        "import a_module_that_nobody_has",
        "",  # as a folder of that name beside the user's work
    ],
)
@pytest.mark.parametrize("kind", ["tensorrt", "rtx"])
def test_a_module_that_does_not_import_is_a_missing_dependency(install: Any, kind: str, source: str) -> None:
    install(kind, source)
    extra = {"tensorrt": "trt", "rtx": "rtx"}[kind]
    words = ("cannot be imported", pip_line(extra))
    refusal(lambda: import_library(kind), MissingDependencyError, 3, *words)


@pytest.mark.parametrize(
    ("kind", "version", "accepted"),
    [
        ("tensorrt", "11.4.0.12", True),
        ("tensorrt", "11.0", True),
        ("tensorrt", "10.16.1.11", True),
        # The parser has Attention from 10.14 on, RMSNormalization, RotaryEmbedding and TensorScatter from 10.15.
        ("tensorrt", "10.14.1", False),
        ("tensorrt", "10.9.0.34", False),
        ("tensorrt", "8.6.1", False),
        ("rtx", "1.10.0", True),
        ("rtx", "2.0", True),
        ("rtx", "1.5.0.114", True),
        ("rtx", "1.4.9", False),
        ("rtx", "0.9", False),
    ],
)
def test_what_cannot_read_the_graphs_is_too_old(
    monkeypatch: pytest.MonkeyPatch, kind: str, version: str, accepted: bool
) -> None:
    """Numbers are compared as numbers: 1.10 is newer than 1.5."""
    monkeypatch.setitem(sys.modules, MODULES[kind], fake(MODULES[kind], version))
    if accepted:
        assert import_library(kind).version == version
    else:
        refusal(lambda: import_library(kind), MissingDependencyError, 3, version, "too old", "pip install")


def test_a_library_is_found_by_its_package(install: Any) -> None:
    install("tensorrt", "here")
    install("rtx", "here")
    assert library_of("tensorrt-rtx").module is sys.modules["tensorrt_rtx"]
    assert library_of("tensorrt").module is sys.modules["tensorrt"]
    refusal(lambda: library_of("tensorrt_rtx"), InputError, 2, "'tensorrt_rtx'")


# capabilities ------------------------------------------------------------------------------------


def ahead() -> Library:
    return Library(
        "tensorrt-rtx", "1.7.1", fake("tensorrt_rtx", "1.7.1"), ahead_of_time=True, own_cuda_graphs=True
    )


def on_this_gpu() -> Library:
    return Library("tensorrt", "11.4", fake("tensorrt", "11.4"), ahead_of_time=False, own_cuda_graphs=False)


@pytest.mark.parametrize("text", ["86", "8.6", "sm86", "SM86", "SM_86", "sm_86", "sm8.6", " 86 "])
def test_every_way_to_write_a_capability(text: str) -> None:
    assert check_capabilities(ahead(), [text]) == ("SM86",)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["89", "86"], ("SM89", "SM86")),
        (["8.6", "sm86", "89", "86"], ("SM86", "SM89")),
        (["12.0", "121"], ("SM120", "SM121")),
        (["75"], ("SM75",)),
    ],
)
def test_capabilities_are_kept_once_each(wanted: Sequence[str], names: tuple[str, ...]) -> None:
    assert check_capabilities(ahead(), wanted) == names


@pytest.mark.parametrize("text", ["90", "8", "", "CURRENT", "NONE", "smsm86", "ada", "-86", "8,6"])
def test_an_unknown_capability_is_refused_with_all_there_are(text: str) -> None:
    known = "SM75, SM80, SM86, SM89, SM120, SM121"
    refusal(lambda: check_capabilities(ahead(), ["86", text]), InputError, 2, "--sm", repr(text), known)


def test_without_a_wish_everything_from_80_on_is_built_in_order() -> None:
    assert check_capabilities(ahead(), []) == ("SM80", "SM86", "SM89", "SM120", "SM121")


def test_capabilities_are_of_no_use_to_tensorrt() -> None:
    assert check_capabilities(on_this_gpu(), []) == ()
    assert on_this_gpu().capabilities == {}
    refusal(lambda: check_capabilities(on_this_gpu(), ["86"]), InputError, 2, "--sm", "--trt rtx", "11.4")


def test_the_real_library_knows_the_capabilities_of_consumer_gpus(rtx: Library) -> None:
    members = rtx.module.ComputeCapability.__members__
    numbers = sorted(int(n[2:]) for n in members if n.startswith("SM"))
    assert list(rtx.capabilities) == [f"SM{n}" for n in numbers]
    assert all(rtx.capabilities[n] == members[n] for n in rtx.capabilities)
    assert check_capabilities(rtx, []) == tuple(f"SM{n}" for n in numbers if n >= 80)
    assert {"SM86", "SM89", "SM120"} <= set(rtx.capabilities)


@pytest.mark.parametrize(
    ("capability", "here"), [("8.9", True), ("8.6", False), ("12.0", True), ("12.1", False)]
)
def test_an_engine_runs_on_what_it_was_built_for(capability: str, here: bool) -> None:
    assert runs_here(("SM89", "SM120"), Gpu("NVIDIA Test", capability)) is here
