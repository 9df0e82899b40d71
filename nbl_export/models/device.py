"""The device that PyTorch runs a model on, and what is said of it.

A model stays on the CPU, mapped, as its checkpoint stores it; the device gets a part of it at a time
(:mod:`nbl_export.models.weights`). It must have float64, in which moments are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbl_export.errors import MissingDependencyError, first_line
from nbl_export.ranks import place
from nbl_export.settings.definition import AUTO

if TYPE_CHECKING:
    import torch

CPU = "cpu"
_FASTEST = ("cuda", "xpu")
_INSTEAD = "say --device cpu, or leave it out"


def find_device(asked: str) -> torch.device:
    """The device that was ``asked`` for by a setting; ``auto`` is the first GPU that can be used, else the CPU.

    Raises :class:`MissingDependencyError` for a device that is not there or cannot be used.
    """
    import torch

    if asked == AUTO:
        able = (name for name in _FASTEST if _count(name) and _why_not(torch.device(name, 0)) is None)
        asked = next(able, CPU)
    name, _, number = asked.partition(":")
    if name == CPU:
        return torch.device(CPU)
    found = _count(name)
    if not found:
        raise MissingDependencyError(f"--device {asked}: {_none(name)}: {_INSTEAD}.")
    # Two devices are the same only with the same number. Of several processes on a machine, each has its own.
    index = int(number) if number else _local_rank() % found
    if index >= found:
        there = f"{name}:0" if found == 1 else f"{name}:0 to {name}:{found - 1}"
        raise MissingDependencyError(f"--device {asked}: torch sees only {there} here: name one of these.")
    device = torch.device(name, index)
    if why := _why_not(device):
        raise MissingDependencyError(f"--device {asked}: {why}: {_INSTEAD}.")
    return device


def check_device(asked: str) -> None:
    """Raise the error of :func:`find_device`; torch is imported only for what can be refused."""
    if asked not in (AUTO, CPU):
        find_device(asked)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0)) if place().count > 1 else 0


def _count(name: str) -> int:
    import torch

    module = getattr(torch, name)
    return int(module.device_count()) if module.is_available() else 0


def hindrance(name: str) -> str:
    """Why the device called ``name``, as cuda, is not used here; nothing where it is."""
    import torch

    return (_why_not(torch.device(name, 0)) or "") if _count(name) else _none(name)


def _none(name: str) -> str:
    import torch

    if name == "cuda" and torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return (
            f"this torch ({torch.__version__}) is a build without CUDA; install one with it from pytorch.org"
        )
    return f"torch sees no {name} device here"


def _why_not(device: torch.device) -> str | None:
    """Why moments cannot be summed on ``device``, found by doing it; None if they can."""
    import torch

    try:
        one = torch.ones(2, 2, dtype=torch.float64, device=device)
        return None if float((one @ one).sum()) == 8 else "it computes wrongly"
    except (
        RuntimeError,
        TypeError,
    ) as error:  # no float64, or a driver or a GPU that this torch is not built for
        return f"it does not compute in float64 ({first_line(error)})"


def as_setting(device: torch.device | str) -> dict[str, str]:
    """What a ``device`` adds to whatever identifies measurements and unfinished work, which are of one kind of device.

    Nothing for the CPU, which is what everything is of that does not say.
    """
    kind = str(device).partition(":")[0]
    return {} if kind == CPU else {"device": kind}


def described(device: torch.device) -> str:
    """For a record: ``cpu``, or as ``cuda:0, NVIDIA H100``."""
    import torch

    if device.type == CPU:
        return CPU
    return f"{device}, {torch.get_device_module(device).get_device_name(device)}"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, a GPU multiplies float32 as such.

    TF32, which cuDNN uses unless told otherwise, keeps 10 bits of the mantissa: what it loses is a hundred times what
    parity allows, and would be taken for a fault of the graph.
    """
    import torch

    # The flags set their parts, but cannot be read where somebody set a part by itself.
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    parts: tuple[Any, ...] = (flags[0], flags[1].conv, flags[1].rnn)
    before = [part.fp32_precision for part in parts]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, of_flag in zip(flags, (before[:1], before[1:]), strict=True):
            flag.allow_tf32 = set(of_flag) == {"tf32"}
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
