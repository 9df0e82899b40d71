"""Timing several candidates fairly: all in one process, in turn, and a verdict only where the noise allows one.

Every round runs each candidate once, A B C A B C, so that what the machine does meanwhile meets all of them. The
first round warms up and is thrown away. What is compared is paired: the ratio of two candidates in the same round,
its median over the rounds, and an interval for that median that needs no assumption on the noise. While a verdict
is not possible, rounds are added up to a bound; after that it is "not resolved". Fewer than six rounds never allow one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, inf
from typing import TypeVar

import numpy as np

from nbl_export.verify.speed.values import LEAST_ROUNDS, Ratio, Timing

C = TypeVar("C")
T = TypeVar("T")
_CONFIDENCE = 0.95
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
    while running and not _done(number - 1, rounds, time.perf_counter() - start, values, enough):
        for name, candidate in list(running.items()):
            time.sleep(_SETTLE)
            try:
                value = run(candidate)
            except Exception as error:  # each runtime has exceptions of its own
                if absent is None:
                    raise
                absent[name] = reason_of(error)
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


def _done(
    timed: int,
    rounds: Rounds,
    seconds: float,
    values: Mapping[str, list[T]],
    enough: Callable[[Mapping[str, list[T]]], bool],
) -> bool:
    if timed < min(3, rounds.least):
        return False
    if timed >= rounds.most or seconds > rounds.seconds:
        return True
    return _looked_at(timed, rounds.least) and enough(values)


def _looked_at(timed: int, least: int) -> bool:
    """Whether there is a look for a verdict after so many rounds: after ``least``, then after half as many more.

    Each look is another chance to find what is not there; one after every round finds it in more than a twentieth.
    """
    look = least
    while look < timed:
        look = ceil(1.5 * look) if look >= LEAST_ROUNDS else LEAST_ROUNDS
    return look == timed


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reason_of(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def timing(seconds: Sequence[float], passes: Sequence[float] = ()) -> Timing:
    """Median and quartiles of the rounds' ``seconds``; the 99th percentile of single ``passes``, if there are any."""
    median, low, high = (_milliseconds(float(q)) for q in np.quantile(seconds, (0.5, 0.25, 0.75)))
    return Timing(median, low, high, _milliseconds(float(np.quantile(passes, 0.99))) if passes else None)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)


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
    ranks = _ranks(len(values))
    if ranks is None:
        return -inf, inf
    ordered = np.sort(values)
    return float(ordered[ranks[0]]), float(ordered[ranks[1]])


@cache
def _ranks(count: int) -> tuple[int, int] | None:
    """Between which of ``count`` ordered values the interval lies; None where it has no bounds."""
    from scipy.stats import quantile_test

    found = quantile_test(np.arange(count), p=0.5).confidence_interval(_CONFIDENCE)
    return (int(found.low), int(found.high)) if np.isfinite(found.low) else None
