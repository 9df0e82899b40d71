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


@dataclass(frozen=True)
class Checkpoint:
    """Where to save unfinished work, and how often."""

    path: Path
    every_seconds: float = 60.0


@contextmanager
def saving_to(checkpoint: Checkpoint | None, save: Callable[[Path], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call between two steps: it calls ``save`` when a save is due, and after an interrupt.

    The first Ctrl-C (or SIGTERM) is deferred until that call, which saves and raises ``KeyboardInterrupt``. The
    second one stops at once; the last checkpoint remains.
    """
    saved_at = time.monotonic()

    def between() -> None:
        nonlocal saved_at
        due = checkpoint is not None and time.monotonic() - saved_at > checkpoint.every_seconds
        if checkpoint and (due or stop.is_set()):
            save(checkpoint.path)
            saved_at = time.monotonic()
        if stop.is_set():
            raise KeyboardInterrupt

    with _deferred_interrupt() as stop:
        yield between


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handler(signum: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for signum in previous:
        signal.signal(signum, handler)
    try:
        yield stop
    finally:
        for signum, old in previous.items():
            # None means that the handler was not set from Python; the default is the closest substitute.
            signal.signal(signum, signal.SIG_DFL if old is None else old)
