"""Save unfinished work, and stop it between two steps after an interrupt."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import Interrupted


@dataclass(frozen=True)
class Checkpoint:
    """Where to save unfinished work, and how often."""

    path: Path
    every_seconds: float = 60.0


@contextmanager
def saving_to(checkpoint: Checkpoint | None, save: Callable[[Path], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call between two steps: it calls ``save`` when a save is due, and after an interrupt.

    The first Ctrl-C (or SIGTERM, or SIGHUP) is deferred until that call, which saves and raises
    :class:`Interrupted`. The second one stops at once; the last checkpoint remains.
    """
    saved_at = time.monotonic()

    def between() -> None:
        nonlocal saved_at
        if checkpoint and (stop or time.monotonic() - saved_at > checkpoint.every_seconds):
            save(checkpoint.path)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(stop[0])

    with deferred_interrupt() as stop:
        yield between


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP wait; yields the list of the signal that has come, which is empty before.

    The second one raises :class:`Interrupted` at once.
    """
    stop: list[int] = []

    def defer(signum: int) -> None:
        if stop:
            raise Interrupted(signum)
        stop.append(signum)

    with on_signals(defer):
        yield stop


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Within the block, ``handle`` is called with the number of each SIGINT, SIGTERM and SIGHUP.

    One that is ignored stays so (SIGHUP under nohup, SIGINT of a shell's background job). Python lets only the main
    thread hear signals; elsewhere nothing changes.
    """
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread() else ()
    before = {s: old for s in ending if (old := signal.getsignal(s)) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, lambda number, _frame: handle(number))
    try:
        yield
    finally:
        for signum, old in before.items():
            # None means that the handler was not set from Python; the default is the closest substitute.
            signal.signal(signum, signal.SIG_DFL if old is None else old)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
