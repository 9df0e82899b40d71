"""Progress reporting: a stage reports to a listener and does not know what the listener does with it.

Stages never print. They are given a :class:`Listener`: the one of the command line draws progress bars, the
default is silent, and tests use one that records.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class Mebibytes:
    """Counts bytes and reports them in MiB to a task of ``total`` bytes; :meth:`finish` reports the rest."""

    def __init__(self, task: Task, total: int) -> None:
        self._task, self._total = task, mebibytes(total)
        self._bytes = self._reported = 0

    def __call__(self, amount: int) -> None:
        self._bytes += amount
        self._report(min(self._bytes >> 20, self._total))

    def finish(self) -> None:
        self._report(self._total)

    def _report(self, done: int) -> None:
        if done > self._reported:
            self._task.advance(done - self._reported)
            self._reported = done


def mebibytes(size: int) -> int:
    """``size`` bytes in MiB as the total of a task, at least 1."""
    return max(1, size >> 20)


@contextmanager
def bytes_task(listener: Listener, title: str, total: int) -> Iterator[Mebibytes]:
    """A task of ``total`` bytes, reported in MiB."""
    with listener.task(title, mebibytes(total), "MiB") as task:
        done = Mebibytes(task, total)
        yield done
        done.finish()


class _SilentTask:
    def advance(self, amount: int) -> None:
        return None

    def part(self, number: int, count: int) -> None:
        return None


class Silent:
    """A listener that discards everything: the default of the Python API."""

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield _SilentTask()

    def note(self, text: str) -> None:
        return None
