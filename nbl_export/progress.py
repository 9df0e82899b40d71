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
