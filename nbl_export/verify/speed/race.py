"""Race several candidates fairly: all in one process, in turn, and a verdict only where the noise allows one.

Every round runs each candidate once, A B C A B C, so that what the machine does meanwhile meets all of them. The
first round warms up and is thrown away. What is compared is paired: the ratio of two candidates in the same round,
its median over the rounds, and an interval for that median that needs no assumption on the noise. While a verdict
is not possible, rounds are added up to a bound; after that it is "not resolved". Fewer than six rounds never allow one.

Each candidate is compared with its own base (the graph or engine it was made from), beside the ceiling that both
graphs' work allows on the machine's measured roofline, and the linearized one with every other. What `verify`, `bench`,
engines and the K curve want of it is data: who takes part, in which phases and cells, for how many rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from math import ceil, inf
from typing import TypeVar

import numpy as np

from nbl_export.errors import first_line
from nbl_export.progress import Listener, Silent
from nbl_export.verify.speed.candidates import Candidate, Memory, Prompt, ordered
from nbl_export.verify.speed.ceiling import ceiling, timed
from nbl_export.verify.speed.values import (
    DECODE,
    LEAST_ROUNDS,
    PREFILL,
    CellResult,
    Machine,
    Ratio,
    Result,
    Speed,
    Timing,
)
from nbl_export.workspace import LINEARIZED

C = TypeVar("C")
T = TypeVar("T")
_CONFIDENCE = 0.95
# Steps per timed decode round, averaged: one token is too short to time.
DECODE_STEPS = 8
# How far rounds are added where the noise hides the effect, unless something else is asked for.
MORE = 3
# Threads of whoever ran before spin for a while before they sleep; that is not the next one's time.
_SETTLE = 0.02


@dataclass(frozen=True)
class Rounds:
    """At least ``least`` rounds after the warm-up; while a verdict is missing, up to ``most`` or ``seconds``.

    ``seconds`` bounds the first ``least`` too, of which three are always run. The warm-up, in which one may compile
    for minutes, does not count.
    """

    least: int
    most: int
    seconds: float = float("inf")


def race(
    candidates: Mapping[str, C],
    run: Callable[[C], T],
    rounds: Rounds,
    advance: Callable[[int], None],
    enough: Callable[[Mapping[str, list[T]]], bool] = lambda _: True,
    absent: dict[str, str] | None = None,
) -> dict[str, list[T]]:
    """What ``run`` gives for each candidate, by name, one value a round.

    ``enough`` looks at the values so far; while it says no, rounds are added within ``rounds``, half as many again.
    ``advance`` is told each of the first ``rounds.least + 1``. One that fails on the way (no room for its cache) drops
    out, with its reason in ``absent``; without such a dictionary the error is raised.
    """
    running, start, number = dict(candidates), time.perf_counter(), 0
    values: dict[str, list[T]] = {name: [] for name in candidates}

    def done(timed: int, seconds: float) -> bool:
        if timed < min(3, rounds.least):
            return False
        if timed >= rounds.most or seconds > rounds.seconds:
            return True
        return _looked_at(timed, rounds.least) and enough(values)

    while running and not done(number - 1, time.perf_counter() - start):
        for name, candidate in list(running.items()):
            time.sleep(_SETTLE)
            try:
                value = run(candidate)
            except Exception as error:  # each runtime has exceptions of its own
                if absent is None:
                    raise
                absent[name] = first_line(error)
                del running[name]
                continue
            if number:
                values[name].append(value)
        if not number:
            start = time.perf_counter()
        if number <= rounds.least:
            advance(1)
        number += 1
    advance(max(0, rounds.least + 1 - number))
    return {name: values[name] for name in running}


def _looked_at(timed: int, least: int) -> bool:
    """Whether there is a look for a verdict after so many rounds: after ``least``, then after half as many more.

    Each look is another chance to find what is not there; one after every round finds it in more than a twentieth.
    """
    look = least
    while look < timed:
        look = ceil(1.5 * look) if look >= LEAST_ROUNDS else LEAST_ROUNDS
    return look == timed


def timing(seconds: Sequence[float], passes: Sequence[float] = ()) -> Timing:
    """Median and quartiles of the rounds' ``seconds``; the 99th percentile of single ``passes``, if there are any."""
    figures = [*np.quantile(seconds, (0.5, 0.25, 0.75)), *([np.quantile(passes, 0.99)] if passes else [])]
    return Timing(*(round(float(one) * 1e3, 4) for one in figures))


def ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """base/other of each round, as :class:`Ratio`: above 1, the other is faster."""
    pairs = np.array(base) / np.array(other)
    low, value, high = (float(q) for q in np.quantile(pairs, (0.25, 0.5, 0.75)))
    least, most = median_interval(pairs.tolist())
    own = median_interval(base)
    spread = (own[1] - own[0]) / 2 / float(np.median(base))
    outside = least > 1 or most < 1
    return Ratio(value, low, high, least, most, outside and spread < abs(1 - 1 / value))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what ``values`` are drawn from with 95 % confidence.

    Between two order statistics, whatever the distribution (the number of draws below its median is binomial). Even
    the range of fewer than six values holds it less often (75 % of three, 94 % of five): then it has no bounds.
    """
    from scipy.stats import binom  # half a second

    rank = int(binom.ppf((1 - _CONFIDENCE) / 2, len(values), 0.5)) - 1
    ordered = [-inf, *sorted(values), inf]
    return ordered[rank + 1], ordered[-2 - rank]


# one round ----------------------------------------------------------------------------------------

# Seconds of each pass of one round, and the bytes of cache and work space after it.
Round = tuple[tuple[float, ...], int]


def prefill_seconds(prompt: Prompt) -> tuple[float, ...]:
    """Seconds of one prefill: the time to the first token."""
    return (timed(prompt.prefill),)


def decode_seconds(prompt: Prompt, steps: int = DECODE_STEPS) -> tuple[float, ...]:
    """Seconds of each of a few decode steps in a row, after the prompt."""
    prompt.rewind()
    prompt.step()  # what whoever ran before left in the caches is not this one's time
    return tuple(timed(prompt.step) for _ in range(steps))


def _means(rounds: Sequence[Round]) -> list[float]:
    """Seconds a pass, the mean of each round."""
    return [sum(passes) / len(passes) for passes, _ in rounds]


# all cells ----------------------------------------------------------------------------------------

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
        self, batch: int, context: int, held: dict[str, int], advance: Callable[[int], None]
    ) -> Iterator[CellResult]:
        absent: dict[str, str] = {}
        taking = self.memory.fitting(self.candidates, (batch, context), held, absent)
        running: dict[str, Callable[[], Prompt]] = {c.name: partial(c.make, context, batch) for c in taking}
        if not self.anew:
            running = self._made(running, absent)
        for phase in self.phases:
            if phase == DECODE and context == self.positions:
                advance(self.rounds.least + 1)
                continue

            def run(made: Callable[[], Prompt], phase: str = phase) -> Round:
                prompt = made()
                if self.anew:
                    prompt.prefill()  # the first run of a session is not as fast as the others
                passes = decode_seconds(prompt, self.steps) if phase == DECODE else prefill_seconds(prompt)
                return passes, prompt.memory_bytes()

            reasons = None if self.strict else absent
            rounds = race(running, run, self.rounds, advance, self._resolved, reasons)
            running = {name: running[name] for name in rounds}
            cell = CellResult(phase, batch, context, (), dict(absent))
            results = tuple(self._result(c, cell, rounds) for c in taking if c.name in rounds)
            yield replace(cell, results=results)

    def _made(
        self, makers: Mapping[str, Callable[[], Prompt]], absent: dict[str, str]
    ) -> dict[str, Callable[[], Prompt]]:
        """What gives each cell, made once, in the order of ``makers``; why one cannot be made goes into ``absent``."""
        found: dict[str, Callable[[], Prompt]] = {}
        # Whose session is made first may get the worst memory: that is never to favour the linearized graph.
        for name in sorted(makers, key=lambda name: name != self.linearized):
            try:
                found[name] = repeat(makers[name]()).__next__
            except Exception as error:  # each runtime has exceptions of its own
                if self.strict:
                    raise
                absent[name] = first_line(error)
        return {name: found[name] for name in makers if name in found}

    def _resolved(self, rounds: Mapping[str, list[Round]]) -> bool:
        """Whether every comparison of a candidate with its own base is."""
        pairs = ((rounds.get(str(c.base)), rounds.get(c.name)) for c in self.candidates)
        return all(ratio(_means(base), _means(own)).resolved for base, own in pairs if base and own)

    def _result(self, candidate: Candidate, cell: CellResult, rounds: Mapping[str, list[Round]]) -> Result:
        """Of one ``candidate``; ``cell`` says which it is, ``rounds`` what all of them took in it."""
        phase, batch, context, cost = cell.phase, cell.batch, cell.context, candidate.cost
        ran, roofline = rounds[candidate.name], self.machine.roofline
        own = _means(ran)
        shown = timing(own, [seconds for one, _ in ran for seconds in one] if self.percentile else [])
        base, linearized = rounds.get(str(candidate.base)), rounds.get(self.linearized)
        base_cost = next((c.cost for c in self.candidates if c.name == candidate.base), None)
        of_roofline = best = None
        if cost and roofline:
            of_roofline = 1e3 * roofline.seconds(cost.work(phase, context, batch)) / shown.median_ms
            best = ceiling(base_cost, cost, roofline, phase, context, batch) if base_cost else None
        others = linearized if candidate.name != self.linearized else None
        return Result(
            name=candidate.name,
            timing=shown,
            rounds=len(own),
            tokens_per_second=1e3 * batch * (1 if phase == DECODE else context) / shown.median_ms,
            cache_bytes=ran[-1][1],
            peak_bytes=self.memory.peak(candidate.name, (batch, context)),
            of_roofline=of_roofline,
            over_base=ratio(_means(base), own) if base else None,
            ceiling=best,
            linearized_over=ratio(own, _means(others)) if others else None,
        )
