"""How a stage tells its caller how far it is, without knowing who listens.

Stages never print. They are handed a :class:`Listener`; the command line's draws bars, the default
is silent, a test's records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work with a known total."""

    def advance(self, amount: int) -> None:
        """``amount`` more units are done."""


class Listener(Protocol):
    """Receives what a stage does."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """A context whose value is a :class:`Task`: ``total`` units, ``done`` of them from an earlier run."""

    def note(self, text: str) -> None:
        """One line worth knowing: a fallback, a resumed checkpoint."""


class Mebibytes:
    """Tells a task of ``total`` bytes in MiB how many more are done; what is left at the end is done too."""

    def __init__(self, task: Task, total: int) -> None:
        self._task, self._total = task, mebibytes(total)
        self._bytes = self._told = 0

    def __call__(self, amount: int) -> None:
        self._bytes += amount
        self._tell(min(self._bytes >> 20, self._total))

    def finish(self) -> None:
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if done > self._told:
            self._task.advance(done - self._told)
            self._told = done


def mebibytes(size: int) -> int:
    """``size`` bytes as the total of a task: in MiB, and never nothing."""
    return max(1, size >> 20)


@contextmanager
def bytes_task(listener: Listener, title: str, total: int) -> Iterator[Mebibytes]:
    """A task of ``total`` bytes, shown in MiB."""
    with listener.task(title, mebibytes(total), "MiB") as task:
        done = Mebibytes(task, total)
        yield done
        done.finish()


class _SilentTask:
    def advance(self, amount: int) -> None:
        return None


class Silent:
    """A listener that drops everything: the default of the Python API."""

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield _SilentTask()

    def note(self, text: str) -> None:
        return None
