"""A candidate whose calls take time on a clock of the test's own."""

from __future__ import annotations

import functools
from collections.abc import Callable


class Scripted:
    """A candidate whose every call takes the next of its seconds on a clock of the test's own."""

    def __init__(
        self, name: str, clock: list[float], log: list[str], seconds: Callable[[int], float]
    ) -> None:
        self.name, self._clock, self._log, self._seconds, self.calls = name, clock, log, seconds, 0
        self.times: dict[str, list[float]] = {"prefill": [], "step": []}
        self.prefill, self.step = (functools.partial(self._take, what) for what in self.times)

    def _take(self, what: str) -> None:
        self._log.append(f"{self.name} {what}")
        seconds = self._seconds(self.calls)
        self.calls += 1
        self._clock[0] += seconds
        self.times[what].append(seconds)

    def rewind(self) -> None:
        self._log.append(f"{self.name} rewind")

    def memory_bytes(self) -> int:
        return 1000 + len(self.name)
