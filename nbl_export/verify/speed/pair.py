"""Speed: base and linearized graph, interleaved in one process, next to what the machine allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.batch.rows import Inputs
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import CPU, require_onnxruntime
from nbl_export.verify.speed.candidates import (
    Contender,
    EncoderPass,
    OrtEntrant,
    decode_seconds,
    prefill_seconds,
    profiled,
)
from nbl_export.verify.speed.ceiling import GraphCost, ceiling, graph_cost
from nbl_export.verify.speed.profile import Explanation, explain
from nbl_export.verify.speed.race import Rounds, Timing, race, ratio, timing
from nbl_export.verify.speed.roofline import Roofline, measure_roofline

# How far rounds are added where the noise hides the effect.
_MORE = 3
_Measure = Callable[[Any], float]


@dataclass(frozen=True)
class SpeedCell:
    """One phase at one context, batch 1.

    ``speedup`` is the median over rounds of base/linearized, each pair timed back to back;
    ``speedup_low``/``speedup_high`` are its quartiles, ``speedup_least``/``speedup_most`` a 95 % interval of it.
    ``resolved`` is False where the noise is larger than the effect (:class:`~nbl_export.verify.speed.race.Ratio`).
    ``explanation`` says where a speedup comes from that is surely above its ceiling.
    """

    phase: str
    context: int
    base: Timing
    linearized: Timing
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_least: float
    speedup_most: float
    resolved: bool
    ceiling: float
    rounds: int
    explanation: Explanation | None = None


@dataclass(frozen=True)
class Speed:
    """All cells, the least number of rounds, what both graphs cost, and the machine's roofline."""

    provider: str
    threads: int
    rounds: int
    cells: tuple[SpeedCell, ...]
    base_cost: GraphCost
    linearized_cost: GraphCost
    roofline: Roofline

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# What runs a cell of so many tokens in a session.
_Maker = Callable[[int], Callable[[OrtModel], Contender]]


def measure_speed(
    base: Path, linearized: Path, contexts: Sequence[int], rounds: int, listener: Listener | None = None
) -> Speed:
    """Prefill and decode of both graphs at each context length, ``rounds`` times in turn and more where needed.

    The decode cache is really filled, by the prefill that was just timed.
    """
    pair = _Pair(base, linearized, rounds)
    entrants = {BASE: OrtEntrant(base), LINEARIZED: OrtEntrant(linearized)}
    models = _models(entrants)
    # Without a cache a token costs what its whole text costs: there is no decode to time.
    cached = bool(models[BASE].past_names)
    phases = {"prefill": prefill_seconds} | ({"decode": decode_seconds} if cached else {})
    with (listener or Silent()).task("Timing", len(phases) * len(contexts) * (rounds + 1), "rounds") as task:
        for context in contexts:
            prompts = {name: entrant(context) for name, entrant in entrants.items()}
            for phase, measure in phases.items():
                pair.measure(phase, context, prompts, measure, task.advance)
    return pair.speed()


def measure_encode_speed(
    base: Path,
    linearized: Path,
    batches: Sequence[tuple[int, Inputs]],
    rounds: int,
    listener: Listener | None = None,
) -> Speed:
    """One pass of both encoder graphs over each of ``batches``, a number of tokens and its inputs, in turn."""
    pair = _Pair(base, linearized, rounds)
    models = _models({BASE: OrtEntrant(base), LINEARIZED: OrtEntrant(linearized)})
    with (listener or Silent()).task("Timing", len(batches) * (rounds + 1), "rounds") as task:
        for tokens, inputs in batches:
            passes = {name: EncoderPass(model, inputs) for name, model in models.items()}
            pair.measure("encode", tokens, passes, prefill_seconds, task.advance)
    return pair.speed()


def _models(entrants: Mapping[str, OrtEntrant]) -> dict[str, OrtModel]:
    """Both sessions; the first made may get the worst memory, which is never to favour the linearized graph."""
    made = {name: entrants[name].model for name in (LINEARIZED, BASE)}
    return {name: made[name] for name in entrants}


def explained(
    speed: Speed, base: Path, linearized: Path, listener: Listener | None = None, made: _Maker = profiled
) -> Speed:
    """``speed`` with the reason of each speedup that is surely above its ceiling, by a profile of both graphs.

    ``made`` gives what runs a cell of so many tokens in a session.
    """
    cells = []
    with (listener or Silent()).task("Looking into speedups", len(speed.cells), "cells") as task:
        for one in speed.cells:
            run, ms = made(one.context), one.base.median_ms
            reason = explain((base, linearized), one.phase, run, ms, one.speedup_least, one.ceiling)
            cells.append(replace(one, explanation=reason))
            task.advance(1)
    return replace(speed, cells=tuple(cells))


class _Pair:
    """The cells of two graphs, as they are measured."""

    def __init__(self, base: Path, linearized: Path, rounds: int) -> None:
        require_onnxruntime()
        self._rounds = Rounds(rounds, _MORE * rounds)
        self._costs = graph_cost(base), graph_cost(linearized)
        self._roofline = measure_roofline()
        self._cells: list[SpeedCell] = []

    def measure(
        self,
        phase: str,
        context: int,
        both: Mapping[str, Any],
        measure: _Measure,
        advance: Callable[[int], None],
    ) -> None:
        times = race(both, measure, self._rounds, advance, lambda t: ratio(t[BASE], t[LINEARIZED]).resolved)
        limit = ceiling(*self._costs, self._roofline, phase, context)
        self._cells.append(cell(phase, context, times[BASE], times[LINEARIZED], limit))

    def speed(self) -> Speed:
        return Speed(
            CPU, os.cpu_count() or 1, self._rounds.least, tuple(self._cells), *self._costs, self._roofline
        )


def cell(
    phase: str, context: int, base: Sequence[float], linearized: Sequence[float], limit: float
) -> SpeedCell:
    """From the seconds of each round."""
    found = ratio(base, linearized)
    return SpeedCell(
        phase,
        context,
        timing(base),
        timing(linearized),
        found.value,
        found.low,
        found.high,
        found.least,
        found.most,
        found.resolved,
        limit,
        len(base),
    )
