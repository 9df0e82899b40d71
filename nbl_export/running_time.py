"""How long this process has run."""

from __future__ import annotations

import time


class RunningTime:
    """Seconds in which this process ran: what it stood still in, as after Ctrl-Z, does not count.

    Someone looks more often than every ``step`` seconds; what is more between two looks is not counted.
    """

    def __init__(self, step: float) -> None:
        self._step, self._last = step, time.monotonic()

    def since_last(self) -> float:
        """Seconds since this was called last, or since the beginning."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, self._step), now
        return passed
