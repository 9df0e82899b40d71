"""What loading and running a graph may take: a graph may hold a loop without end, or ask for all memory.

1. Memory: while onnxruntime works, this process may grow by a stated amount (``RLIMIT_DATA``, on Linux). An operator
   that asks for more gets none, and onnxruntime raises an error that names it.
2. Time: a run is ended between two operators, also inside a loop.
3. One operator that never returns cannot be ended from outside: then the process has to end. A library may not do
   that; the command line does (:data:`when_stuck`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbl_export.running_time import RunningTime

_LOOK = 0.5  # seconds between two looks at the clock
_GRACE = 10.0  # seconds after which a run that was told to end is stuck
_BASE = 2 << 30  # bytes
_OF_FILES = 16  # a 4-bit weight may be stored as float32 (8 times), and once more as onnxruntime packs it
_OF_TOKEN = 8 << 20  # bytes; the logits of a token are up to 1 MiB
# Bytes for a token and one that it attends to; 128 heads take 512 in float32, a few times over.
_OF_PAIR = 4 << 10
_SECONDS_OF_TOKEN, _SECONDS_OF_PAIR = 1e-2, 2e-6  # ten times what SmolLM2-135M takes on two cores
_OF_FLOATS = 256  # an image, or a KV cache of which each value is read by many queries


@dataclass(frozen=True)
class Bounds:
    """What one load or run of a graph may take: ``seconds``, and bytes of ``memory`` beyond what the process has.

    ``memory`` is None where nothing is held to it: a CUDA driver reserves far more than it uses. A load maps ``mapped``
    bytes of files beside it, which count for the limit and take no memory.
    """

    seconds: float
    memory: int | None
    mapped: int = 0

    def fed(self, feeds: Mapping[str, Any]) -> Bounds:
        """These bounds for a run on ``feeds``: more for each token, each pair of tokens and each pixel."""
        integers = [array for array in feeds.values() if array.dtype.kind in "iub"]
        context = max((array.shape[-1] for array in integers if array.ndim), default=0)
        tokens = max((array.size for array in integers), default=0)
        floats = sum(array.nbytes for array in feeds.values() if array.dtype.kind not in "iub")
        seconds = self.seconds + tokens * (_SECONDS_OF_TOKEN + _SECONDS_OF_PAIR * context)
        more = tokens * (_OF_TOKEN + _OF_PAIR * context) + _OF_FLOATS * floats
        return Bounds(seconds, None if self.memory is None else self.memory + more)


def bounds_of(size: int, seconds: float | None = None) -> Bounds:
    """The bounds of a graph whose files have ``size`` bytes.

    A prefill of thousands of tokens on a slow machine takes less than a second for each MB of weights.
    """
    return Bounds(45 + size / 1e6 if seconds is None else seconds, _BASE + _OF_FILES * size)


class Late(Exception):
    """A run was ended, since it took longer than its bounds allow."""


# Called from another thread with a sentence when onnxruntime does not return; it must end the process.
when_stuck: Callable[[str], object] | None = None


@contextmanager
def bounded(bounds: Bounds, doing: str, options: Any = None) -> Iterator[None]:
    """Hold what onnxruntime does inside to ``bounds``; ``doing`` is "load the graph" or "run the graph".

    ``options`` are the run's, which end it. Raises :class:`Late` for an error of a run that was ended by them.
    """
    work = _Work(bounds.seconds, doing, options)
    _WORKING[id(work)] = work
    _watchdog()
    try:
        with _growing_by(bounds.memory, bounds.mapped):
            yield
    except Exception as error:  # onnxruntime's exceptions have no common base class
        if options is not None and options.terminate:
            raise Late(f"it takes longer than {bounds.seconds:,.0f} s, as a loop without end does") from error
        raise
    finally:
        del _WORKING[id(work)]


class _Work:
    """What onnxruntime is doing, and for how long it has."""

    def __init__(self, seconds: float, doing: str, options: Any) -> None:
        self.seconds, self.doing, self.options = seconds, doing, options
        self._clock, self._passed = RunningTime(2 * _LOOK), 0.0

    def look(self) -> None:
        self._passed += self._clock.since_last()
        if self._passed > self.seconds and self.options is not None:
            self.options.terminate = True
        grace = _GRACE if self.options is not None else 0
        if when_stuck is not None and self._passed > self.seconds + grace:
            what = "one operator takes" if self.options is not None else "it takes"
            when_stuck(
                f"onnxruntime does not {self.doing}: {what} longer than {self.seconds:,.0f} s; export the model "
                "again, or use a faster machine."
            )


_WORKING: dict[int, _Work] = {}


@cache
def _watchdog() -> threading.Thread:
    """One thread looks after all that is working."""

    def watch() -> None:
        while True:
            time.sleep(_LOOK)
            for work in list(_WORKING.values()):
                work.look()

    thread = threading.Thread(target=watch, daemon=True, name="nbl-export-watchdog")
    thread.start()
    return thread


_LOCK = threading.Lock()
_BEFORE: list[int] = []  # the limit of this process outside of all work
_LIMITS: list[int] = []  # those of the work that is going on


@contextmanager
def _growing_by(size: int | None, mapped: int = 0) -> Iterator[None]:
    """Let the process grow by ``size`` bytes, or by all memory that is free if that is less, and by ``mapped``."""
    if size is None or sys.platform != "linux":  # elsewhere the limit is not kept, or there is none
        yield
        return
    import psutil

    free = psutil.virtual_memory().available + psutil.swap_memory().free
    limit = _data() + min(size, free) + mapped
    with _LOCK:
        _LIMITS.append(limit)
        _set_limit()
    try:
        yield
    finally:
        with _LOCK:
            _LIMITS.remove(limit)
            _set_limit()


def _set_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    _BEFORE[:] = _BEFORE or [soft]
    known = [limit for limit in (*_BEFORE, hard) if limit != resource.RLIM_INFINITY]
    if _LIMITS:
        resource.setrlimit(resource.RLIMIT_DATA, (min([max(_LIMITS), *known]), hard))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (_BEFORE.pop(), hard))


def _data() -> int:
    """The bytes of this process that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
