"""What stops work in the middle, at a step that a test names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nbl_export.progress import Silent


class Recorder(Silent):
    """A listener that records, and does something at one of its calls."""

    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None) -> None:
        self.notes: list[str] = []
        self.advanced: list[int] = []
        self.start = (0, 0)
        self.at, self.action = at, action

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        self.start = (total, done)
        yield self

    def advance(self, amount: int) -> None:
        self.advanced.append(amount)
        if len(self.advanced) == self.at:
            self.action()

    def note(self, text: str) -> None:
        self.notes.append(text)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def crash() -> None:
    raise RuntimeError("the power went")
