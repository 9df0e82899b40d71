"""Report progress: a stage reports to a listener and does not know what the listener does with it.

Stages never print. They are given a :class:`Listener`: the one of the command line draws progress bars, the
default is silent, and tests use one that records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A running task with a known total."""

    def advance(self, amount: int) -> None:
        """``amount`` more units are done."""

    def part(self, number: int, count: int) -> None:
        """The part ``number``, from 1, of ``count`` begins: a layer of a model, for example."""


class Listener(Protocol):
    """Receives the progress and the notes of a stage."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """A context whose value is a :class:`Task`: ``total`` units, ``done`` of them from an earlier run."""

    def note(self, text: str) -> None:
        """One line worth knowing: a fallback, a resumed checkpoint."""


@contextmanager
def bytes_task(listener: Listener, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A task of ``total`` bytes, reported in MiB; its value is called with the bytes that are done."""
    whole, done, reported = max(1, total >> 20), 0, 0

    def count(amount: int) -> None:
        nonlocal done, reported
        done += amount
        if (now := min(done >> 20, whole)) > reported:
            task.advance(now - reported)
            reported = now

    with listener.task(title, whole, "MiB") as task:
        yield count
        count((whole << 20) - done)


class Silent:
    """A listener that discards everything, and its own task: the default of the Python API."""

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield self

    def advance(self, amount: int) -> None:
        return None

    def part(self, number: int, count: int) -> None:
        return None

    def note(self, text: str) -> None:
        return None
