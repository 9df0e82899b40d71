"""How fast this machine is at what the stages of a run do: measured in a second or two, for estimates of their time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SECONDS = 0.4  # of each measurement
_ROWS, _WIDTH = 1024, 1024
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second of matrix products, in the model's precision and in float64; bytes per
    second of reading from disk and of hashing.
    """

    fast: float
    exact: float
    read: float
    hashed: float


def rates(dtype: torch.dtype, device: torch.device, file: Path | None) -> Rates:
    """The rates of this machine; ``file`` is a large one, read where the models lie."""
    import torch

    hashed = _per_second(lambda: hashlib.sha256(bytes(_BLOCK)).digest(), _BLOCK)
    fast, exact = (_products(kind, device) for kind in (dtype, torch.float64))
    return Rates(fast, exact, min(_reading(file), 1e12) if file else hashed, hashed)


def _products(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of rows [1024, 1024] times a matrix [1024, 1024]."""
    import torch

    a, b = (torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        out[0, 0].item()  # a GPU has then done it

    multiply()
    return _per_second(multiply, 2.0 * _ROWS * _WIDTH * _WIDTH)


def _per_second(do: Callable[[], object], amount: float) -> float:
    """``amount`` per second of the fastest call: what else runs on the machine makes others slower."""
    fastest, ends = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        do()
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now > ends:
            return amount / max(fastest, 1e-9)


def _reading(path: Path) -> float:
    """Bytes per second of reading ``path`` from the disk, from a place in it that is not in memory already."""
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start, done = time.perf_counter(), 0
        while done < size and time.perf_counter() < start + _SECONDS:
            done += len(os.pread(handle, _BLOCK, done)) or size
        return min(done, size) / max(time.perf_counter() - start, 1e-9)
    finally:
        os.close(handle)
