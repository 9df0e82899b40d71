"""Checkpoints of long work: where its state is saved, and how it stops between two steps after an interrupt."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Checkpoint:
    """Where to save unfinished work, and how often."""

    path: Path
    every_seconds: float = 60.0


@contextmanager
def saving_to(checkpoint: Checkpoint | None, save: Callable[[Path], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call between two steps: it calls ``save`` when a save is due, and after an interrupt.

    The first Ctrl-C (or SIGTERM, or SIGHUP) is deferred until that call, which saves and raises
    :class:`Interrupted`. The second one stops at once; the last checkpoint remains. A signal that is ignored stays so.
    """
    saved_at = time.monotonic()

    def between() -> None:
        nonlocal saved_at
        due = checkpoint is not None and time.monotonic() - saved_at > checkpoint.every_seconds
        if checkpoint and (due or stop):
            save(checkpoint.path)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(stop[0])

    with deferred_interrupt() as stop:
        yield between


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP wait; yields the list of the signal that has come, which is empty before.

    The second one raises :class:`Interrupted` at once. A signal that is ignored stays so.
    """
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return

    def handler(signum: int, _frame: Any) -> None:
        if stop:
            raise Interrupted(signum)
        stop.append(signum)

    heard = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handler) for s in heard}
    try:
        yield stop
    finally:
        for signum, old in previous.items():
            # None means that the handler was not set from Python; the default is the closest substitute.
            signal.signal(signum, signal.SIG_DFL if old is None else old)
