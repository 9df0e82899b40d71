"""A limit of time for a trace, which runs in Python: it may take hours for code that loops over tokens or experts."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nbl_export.errors import InputError
from nbl_export.running_time import RunningTime

# Ten times what a slow core takes to follow the code of a model without experts; of 128 experts, four times.
_BASE, _OF_BLOCK = 120.0, 60.0
# A graph of 128 experts is written in ten times the time in which they were followed.
_TO_WRITE, _TIMES = 300.0, 40.0
_LOOK = 0.5  # seconds between two looks at the clock
_AGAIN = 5.0  # seconds after which what was not heard is said again: some code catches everything


class _Late(BaseException):
    """Raised in the thread that traces; no ``Exception``, since torch catches these and goes on."""


def seconds_for(blocks: int) -> float:
    """How long it may take to follow the code of that many blocks."""
    return _BASE + _OF_BLOCK * blocks


def seconds_to_write(followed: float) -> float:
    """How long it may take to write the graph of code that was followed in ``followed`` seconds."""
    return _TO_WRITE + _TIMES * followed


@contextmanager
def time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise :class:`InputError` once the block has run for ``seconds``; ``name`` is the model's.

    Python code is ended wherever it is; a call into a library is ended when it returns.
    """
    watch = _Watch(seconds)
    try:
        try:
            watch.start()
            yield
        finally:
            watch.stop()
    except _Late:
        watch.stop()
        raise InputError(
            f"Tracing {name} takes longer than {seconds:,.0f} s, as it does for code that loops over the tokens of a "
            "text: use another --kv-cache or --exporter, or a faster machine."
        ) from None


class _Watch:
    """A thread that looks at the clock while another one works, and ends that one's work."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._worker = threading.get_ident()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="nbl-export-time-limit")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._over.set()
            _raise_in(self._worker, None)  # one that was not heard yet

    def _watch(self) -> None:
        clock, passed, limit = RunningTime(2 * _LOOK), 0.0, self._seconds
        while not self._over.wait(min(_LOOK, self._seconds)):
            passed += clock.since_last()
            if passed > limit:
                limit = passed + _AGAIN
                with self._lock:
                    if not self._over.is_set():
                        _raise_in(self._worker, _Late)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
