"""The two TensorRT libraries: which is installed, what it can build for, and how they differ.

``tensorrt`` builds on the GPU that will run the engine. ``tensorrt-rtx`` builds ahead of time, on any machine, for
the listed compute capabilities. Their Python API is the same; the differences are data in this module.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.engine.gpu import Gpu
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.packages import Part, part
from nbl_export.settings.choices import LIBRARIES


@dataclass(frozen=True)
class _Kind:
    """The facts about one of the two libraries that are known before it is imported."""

    part: Part
    oldest: tuple[int, int]
    ahead_of_time: bool
    own_cuda_graphs: bool


_KINDS = {
    "tensorrt": _Kind(part("tensorrt"), (10, 15), ahead_of_time=False, own_cuda_graphs=False),
    "rtx": _Kind(part("tensorrt-rtx"), (1, 5), ahead_of_time=True, own_cuda_graphs=True),
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT library.

    ``package`` is its PyPI name, ``ahead_of_time`` whether it builds without a GPU, ``own_cuda_graphs`` whether it
    captures CUDA graphs itself (it compiles kernels at run time, so the caller cannot know when to capture).
    """

    package: str
    version: str
    module: Any
    ahead_of_time: bool
    own_cuda_graphs: bool

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

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
    if choice not in LIBRARIES:
        raise InputError(f"--trt {choice!r} is unknown; choose {', '.join(LIBRARIES)}.")
    if choice == "tensorrt" or (choice == "auto" and gpu is not None and _is_importable("tensorrt")):
        if gpu is None:
            raise MissingDependencyError(
                "tensorrt builds on the GPU that runs the engine, and no NVIDIA GPU is visible: use --trt rtx "
                f"({_pip('rtx')}) to build ahead of time without one."
            )
        return import_library("tensorrt")
    library = import_library("rtx")
    if choice == "auto" and gpu is not None and not runs_here(tuple(library.capabilities), gpu):
        raise MissingDependencyError(
            f"{library} does not build for this machine's {gpu.name} (compute capability "
            f"{gpu.compute_capability}): {_pip('tensorrt')}, or use --trt rtx to build for other GPUs."
        )
    return library


def import_library(kind: str) -> Library:
    """Import one of the two; raises :class:`MissingDependencyError` if it is missing or too old."""
    facts = _KINDS[kind]
    package = facts.part.package
    try:
        module = importlib.import_module(facts.part.module)
        version = str(module.__version__)
    except (ImportError, AttributeError, OSError) as error:  # OSError: its shared libraries do not load
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingDependencyError(f"{package} cannot be imported ({why}): {_pip(kind)}.") from None
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < facts.oldest:
        oldest = ".".join(map(str, facts.oldest))
        raise MissingDependencyError(
            f"{package} {version} is too old, {oldest} or newer is needed: {_pip(kind)}."
        )
    return Library(package, version, module, facts.ahead_of_time, facts.own_cuda_graphs)


def library_of(package: str) -> Library:
    """The installed library whose PyPI name is ``package``."""
    kind = next((k for k, facts in _KINDS.items() if facts.part.package == package), None)
    if kind is None:
        raise InputError(
            f"The engine was built by {package!r}, which nbl-export does not know: build it again."
        )
    return import_library(kind)


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
    names = []
    for text in wanted:
        digits = text.strip().upper().removeprefix("SM").removeprefix("_").replace(".", "")
        if f"SM{digits}" not in known:
            raise InputError(
                f"--sm {text.strip()!r} is unknown to {library}; it can build for {', '.join(known)}."
            )
        names.append(f"SM{digits}")
    return tuple(dict.fromkeys(names))


def runs_here(capabilities: Sequence[str], gpu: Gpu) -> bool:
    """Whether an engine built ahead of time for ``capabilities`` runs on ``gpu``."""
    return f"SM{gpu.compute_capability.replace('.', '')}" in capabilities


def _is_importable(kind: str) -> bool:
    try:
        import_library(kind)
    except MissingDependencyError:
        return False
    return True


def _pip(kind: str) -> str:
    return _KINDS[kind].part.pip
