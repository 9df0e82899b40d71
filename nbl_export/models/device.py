"""The device that PyTorch runs a model on, and what is said of it.

A model stays on the CPU, mapped, as its checkpoint stores it; the device gets a part of it at a time
(:mod:`nbl_export.models.weights`). It must have float64, in which moments are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nbl_export.errors import MissingDependencyError, first_line
from nbl_export.ranks import place
from nbl_export.settings.definition import AUTO

CPU = "cpu"
_FASTEST = ("cuda", "xpu")


def find_device(asked: str) -> torch.device:
    """The device that was ``asked`` for by a setting; ``auto`` is the first GPU that can be used, else the CPU.

    Raises :class:`MissingDependencyError` for a device that is not there or cannot be used.
    """
    if asked == AUTO:
        asked = next((name for name in _FASTEST if not hindrance(name)), CPU)
    name, _, number = asked.partition(":")
    if name == CPU:
        return torch.device(CPU)
    # Two devices are the same only with the same number. Of several processes on a machine, each has its own.
    found, own = _count(name), int(os.environ.get("LOCAL_RANK", 0)) if place().count > 1 else 0
    index = int(number) if number else own % max(1, found)
    if found and index >= found:
        there = f"{name}:0" if found == 1 else f"{name}:0 to {name}:{found - 1}"
        raise MissingDependencyError(f"--device {asked}: torch sees only {there} here: name one of these.")
    if why := hindrance(name, index):
        raise MissingDependencyError(f"--device {asked}: {why}: say --device cpu, or leave it out.")
    return torch.device(name, index)


def _count(name: str) -> int:
    module = getattr(torch, name)
    return int(module.device_count()) if module.is_available() else 0


def hindrance(name: str, index: int = 0) -> str:
    """Why the device called ``name``, as cuda, is not used here; nothing where it is.

    Moments are summed in float64, which is tried.
    """
    if not _count(name):
        if name == "cuda" and torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
            return f"this torch ({torch.__version__}) is a build without CUDA; install one with it from pytorch.org"
        return f"torch sees no {name} device here"
    try:
        one = torch.ones(2, 2, dtype=torch.float64, device=torch.device(name, index))
        return "" if float((one @ one).sum()) == 8 else "it computes wrongly"
    except (RuntimeError, TypeError) as error:
        # No float64, or a driver or a GPU that this torch is not built for.
        return f"it does not compute in float64 ({first_line(error)})"


def as_setting(device: torch.device | str) -> dict[str, str]:
    """What a ``device`` adds to whatever identifies measurements and unfinished work, which are of one kind of device.

    Nothing for the CPU, which is what everything is of that does not say.
    """
    kind = str(device).partition(":")[0]
    return {} if kind == CPU else {"device": kind}


def described(device: torch.device) -> str:
    """For a record: ``cpu``, or as ``cuda:0, NVIDIA H100``."""
    if device.type == CPU:
        return CPU
    return f"{device}, {torch.get_device_module(device).get_device_name(device)}"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, a GPU multiplies float32 as such.

    TF32, which cuDNN uses unless told otherwise, keeps 10 bits of the mantissa: what it loses is a hundred times what
    parity allows, and would be taken for a fault of the graph.
    """
    # A flag sets its parts, but cannot be read where somebody set a part by itself.
    cudnn: Any = torch.backends.cudnn
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0] == "tf32"
        cudnn.allow_tf32 = set(before[1:]) == {"tf32"}
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
