"""Collect what a verification measures: the report's sections, verdicts and notes, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from nbl_export.records import Check, Status
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, EngineParity, Likeness, MethodLoss
from nbl_export.verify.speed.values import Speed


@dataclass
class Measurement:
    """A section that was not run is None, and a check says why; ``divergence`` is where parity is lost, if it is."""

    parity: DecoderParity | EncoderParity | None = None
    divergence: str | None = None
    method_loss: MethodLoss | Likeness | None = None
    speed: Speed | None = None
    engine_parity: EngineParity | None = None
    engine_speed: Speed | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, status: Status, detail: str) -> None:
        self.checks.append(Check(name, status, detail))

    def check_parity(self, failures: Sequence[str], within: str, lost: Callable[[], str | None]) -> None:
        """Parity's verdict: ``within`` says what passed; ``lost`` finds where what failed is lost."""
        if failures:
            self.divergence = lost()
            failures = [*failures, *([self.divergence] if self.divergence else [])]
        self.check("parity", "failed" if failures else "passed", "; ".join(failures) or within)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Give the first check that is added meanwhile the seconds it took: the others judge what was measured with it.

        A part that was skipped has no time.
        """
        first, begin = len(self.checks), time.perf_counter()
        yield
        if len(self.checks) > first and self.checks[first].status != "skipped":
            self.checks[first] = replace(self.checks[first], seconds=time.perf_counter() - begin)
