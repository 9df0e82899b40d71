"""What stops work in the middle, at a step that a test names."""

from __future__ import annotations

import os
from collections.abc import Callable

from tests.listening import Notes


class Recorder(Notes):
    """A listener that records, and does something at one of its calls."""

    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.at, self.action = at, action

    def advance(self, amount: int) -> None:
        super().advance(amount)
        if len(self.advanced) == self.at:
            self.action()


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def crash() -> None:
    raise RuntimeError("the power went")
