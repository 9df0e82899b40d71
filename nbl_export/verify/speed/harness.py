"""The one race of everything that is timed: candidates over phases and cells, in turn, beside what the machine allows.

Each candidate is compared with its own base (the graph or engine it was made from), beside the ceiling that both
graphs' work allows on the machine's measured roofline, and the linearized one with every other. What `verify`, `bench`,
engines and the K curve want of it is data: who takes part, in which phases and cells, for how many rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbl_export.batch.names import LINEARIZED
from nbl_export.progress import Listener, Silent
from nbl_export.verify.speed.candidates import (
    DECODE_STEPS,
    Anew,
    Candidate,
    Prompt,
    decode_seconds,
    prefill_seconds,
)
from nbl_export.verify.speed.ceiling import ceiling
from nbl_export.verify.speed.memory import Memory, ordered
from nbl_export.verify.speed.race import Rounds, race, ratio, reason_of, timing
from nbl_export.verify.speed.values import DECODE, PREFILL, CellResult, Machine, Result, Speed

# Seconds of each pass of one round.
Passes = tuple[float, ...]
_Advance = Callable[[int], None]
_NO_PEAKS = Memory()


@dataclass(frozen=True)
class Harness:
    """Who takes part, on which machine, and for how long; ``linearized`` is the candidate that the race is about.

    ``positions`` are those of the model: after the last of them there is no token to decode. A round of decode is so
    many ``steps``; with ``percentile`` the 99th of single passes is given too. A candidate that cannot be made or run
    is left out of the cell with its reason, or, ``strict``, its error is raised. With ``anew`` only one is in memory at
    a time: it is made for each round.
    """

    candidates: Sequence[Candidate]
    machine: Machine
    rounds: Rounds
    phases: Sequence[str] = (PREFILL, DECODE)
    linearized: str = LINEARIZED
    memory: Memory = _NO_PEAKS
    positions: int | None = None
    steps: int = DECODE_STEPS
    percentile: bool = False
    strict: bool = False
    anew: bool = False

    def measure(self, cells: Sequence[tuple[int, int]], listener: Listener | None = None) -> Speed:
        """Race in every cell (batch, context) and phase."""
        return self.speed([result for one in self.run(cells, listener) for result in one])

    def speed(self, cells: Sequence[CellResult]) -> Speed:
        """What a race of these candidates gave in ``cells``."""
        infos = tuple(c.info for c in self.candidates)
        return Speed(self.machine, self.rounds.least, infos, tuple(cells), self.linearized)

    def run(
        self, cells: Sequence[tuple[int, int]], listener: Listener | None = None
    ) -> Iterator[list[CellResult]]:
        """Race in every cell (batch, context), phase by phase; those of one cell are given when they are done.

        From the smallest cell to the largest, since runtimes keep the memory that they once took.
        """
        held: dict[str, int] = {}
        total = len(self.phases) * len(set(cells)) * (self.rounds.least + 1)
        title = "Timing" if self.machine.threads else "Timing on the GPU"
        with (listener or Silent()).task(title, total, "rounds") as task:
            for batch, context in ordered(cells):
                yield list(self._cell(batch, context, held, task.advance))

    def _cell(
        self, batch: int, context: int, held: dict[str, int], advance: _Advance
    ) -> Iterator[CellResult]:
        absent: dict[str, str] = {}
        taking = self.memory.fitting(self.candidates, (batch, context), held, absent)
        prompts: dict[str, Any] = (
            {c.name: Anew(c.make, context, batch) for c in taking}
            if self.anew
            else self._made(taking, context, batch, absent)
        )
        for phase in self.phases:
            if phase == DECODE and context == self.positions:
                advance(self.rounds.least + 1)
                continue
            reasons = None if self.strict else absent
            rounds = race(prompts, self._measure(phase), self.rounds, advance, self._resolved, reasons)
            prompts = {name: prompts[name] for name in rounds}
            cell = CellResult(phase, batch, context, (), dict(absent))
            results = tuple(
                self._result(c, cell, rounds, prompts[c.name].memory_bytes())
                for c in taking
                if c.name in rounds
            )
            yield replace(cell, results=results)

    def _made(
        self, candidates: Sequence[Candidate], context: int, batch: int, absent: dict[str, str]
    ) -> dict[str, Prompt]:
        """What runs the cell, by name in the candidates' order; the reason of one that cannot be made is noted."""
        found: dict[str, Prompt] = {}
        # Whose session is made first may get the worst memory: that is never to favour the linearized graph.
        for one in sorted(candidates, key=lambda c: c.name != self.linearized):
            try:
                found[one.name] = one.make(context, batch)
            except Exception as error:  # each runtime has exceptions of its own
                if self.strict:
                    raise
                absent[one.name] = reason_of(error)
        return {c.name: found[c.name] for c in candidates if c.name in found}

    def _measure(self, phase: str) -> Callable[[Any], Passes]:
        def measure(prompt: Prompt) -> Passes:
            return decode_seconds(prompt, self.steps) if phase == DECODE else prefill_seconds(prompt)

        return (lambda one: one.measured(measure)) if self.anew else measure

    def _resolved(self, rounds: Mapping[str, list[Passes]]) -> bool:
        """Whether every comparison of a candidate with its own base is."""
        pairs = ((rounds.get(str(c.base)), rounds.get(c.name)) for c in self.candidates)
        return all(ratio(_means(base), _means(own)).resolved for base, own in pairs if base and own)

    def _result(
        self, candidate: Candidate, cell: CellResult, rounds: Mapping[str, list[Passes]], cache: int
    ) -> Result:
        """Of one ``candidate``; ``cell`` says which it is, ``rounds`` what all of them took in it."""
        phase, batch, context, cost = cell.phase, cell.batch, cell.context, candidate.cost
        own, roofline = _means(rounds[candidate.name]), self.machine.roofline
        passes = [seconds for one in rounds[candidate.name] for seconds in one] if self.percentile else []
        shown = timing(own, passes)
        base, linearized = rounds.get(str(candidate.base)), rounds.get(self.linearized)
        base_cost = next((c.cost for c in self.candidates if c.name == candidate.base), None)
        least = roofline.seconds(cost.work(phase, context, batch)) if cost and roofline else None
        others = linearized if candidate.name != self.linearized else None
        return Result(
            name=candidate.name,
            timing=shown,
            rounds=len(own),
            tokens_per_second=1e3 * batch * (1 if phase == DECODE else context) / shown.median_ms,
            cache_bytes=cache,
            peak_bytes=self.memory.peak(candidate.name, (batch, context)),
            of_roofline=None if least is None else 1e3 * least / shown.median_ms,
            over_base=ratio(_means(base), own) if base else None,
            ceiling=(
                ceiling(base_cost, cost, roofline, phase, context, batch)
                if base_cost and cost and roofline
                else None
            ),
            linearized_over=ratio(own, _means(others)) if others else None,
        )


def _means(rounds: Sequence[Passes]) -> list[float]:
    """Seconds a pass, the mean of each round."""
    return [sum(passes) / len(passes) for passes in rounds]
