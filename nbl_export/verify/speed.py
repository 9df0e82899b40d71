"""Speed: base and linearized graph, interleaved in one process, next to the analytic ceiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nbl_export.graph.interface import Inputs
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.ort import OrtModel, require_onnxruntime
from nbl_export.runtime.prompts import OrtPrompt
from nbl_export.verify.ceiling import GraphCost, graph_cost

_T = TypeVar("_T")
# Idle threads of one session must not spin on the cores while the other is timed.
_CONFIG = {"session.force_spinning_stop": "1"}
_DECODE_STEPS = 8  # tokens per timed decode round, averaged: one token is too short to time


@dataclass(frozen=True)
class Timing:
    """Milliseconds per prefill or encoder pass, or per decoded token: median and quartiles over the rounds."""

    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class SpeedCell:
    """One phase at one context, batch 1.

    ``speedup`` is the median over rounds of base/linearized, each pair timed back to back;
    ``speedup_low``/``speedup_high`` are its quartiles. ``resolved`` is False where they straddle 1:
    the noise is then larger than the effect.
    """

    phase: str
    context: int
    base: Timing
    linearized: Timing
    speedup: float
    speedup_low: float
    speedup_high: float
    resolved: bool
    ceiling: float


@dataclass(frozen=True)
class Speed:
    """All cells, the settings they were measured with, and what the KV cache costs."""

    provider: str
    threads: int
    rounds: int
    cells: tuple[SpeedCell, ...]
    base_cost: GraphCost
    linearized_cost: GraphCost

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_speed(
    base: Path, linearized: Path, contexts: Sequence[int], rounds: int, listener: Listener | None = None
) -> Speed:
    """Prefill and decode of both graphs at each context length, ``rounds`` times in turn.

    One round runs base then linearized; the order flips every round so that drift favours neither.
    The decode cache is really filled, by the prefill that was just timed.
    """
    require_onnxruntime()
    models = [OrtModel(path, _CONFIG, rounded=False) for path in (base, linearized)]
    costs = [graph_cost(path) for path in (base, linearized)]
    # Without a cache a token costs what its whole text costs: there is no decode to time.
    phases = {"prefill": _prefill} | ({"decode": _decode} if models[0].past_names else {})
    cells = []
    total = len(phases) * len(contexts) * (rounds + 1)
    with (listener or Silent()).task("Timing", total, "rounds") as task:
        for context in contexts:
            prompts = [OrtPrompt(model, context, _DECODE_STEPS) for model in models]
            for phase, run in phases.items():
                times = _interleaved(prompts, run, rounds, task.advance)
                cells.append(_cell(phase, context, times, _ceiling(phase, context, costs)))
    return Speed("CPUExecutionProvider", os.cpu_count() or 1, rounds, tuple(cells), costs[0], costs[1])


def measure_encode_speed(
    base: Path,
    linearized: Path,
    batches: Sequence[tuple[int, Inputs]],
    rounds: int,
    listener: Listener | None = None,
) -> Speed:
    """One pass of both encoder graphs over each of ``batches``, a number of tokens and its inputs, in turn."""
    require_onnxruntime()
    models = [OrtModel(path, _CONFIG, rounded=False) for path in (base, linearized)]
    costs = [graph_cost(path) for path in (base, linearized)]
    cells = []
    with (listener or Silent()).task("Timing", len(batches) * (rounds + 1), "rounds") as task:
        for tokens, inputs in batches:
            passes = [_Pass(model, inputs) for model in models]
            times = _interleaved(passes, _Pass.seconds, rounds, task.advance)
            cells.append(_cell("encode", tokens, times, _ceiling("prefill", tokens, costs)))
    return Speed("CPUExecutionProvider", os.cpu_count() or 1, rounds, tuple(cells), costs[0], costs[1])


class _Pass:
    """One pass of a graph over one batch."""

    def __init__(self, model: OrtModel, inputs: Inputs) -> None:
        self.model, self.feeds = model, model.interface.named(inputs)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.model.session.run(None, self.feeds)
        return time.perf_counter() - start


def _prefill(prompt: OrtPrompt) -> float:
    start = time.perf_counter()
    prompt.prefill()
    return time.perf_counter() - start


def _decode(prompt: OrtPrompt) -> float:
    start = time.perf_counter()
    for _ in range(_DECODE_STEPS):
        prompt.step()
    return (time.perf_counter() - start) / _DECODE_STEPS


def _interleaved(
    prompts: Sequence[_T],
    run: Callable[[_T], float],
    rounds: int,
    advance: Callable[[int], None],
) -> list[list[float]]:
    times: list[list[float]] = [[], []]
    for round_ in range(rounds + 1):
        for which in (0, 1) if round_ % 2 else (1, 0):
            seconds = run(prompts[which])
            if round_:  # the first round warms up
                times[which].append(seconds)
        advance(1)
    return times


def _cell(phase: str, context: int, times: list[list[float]], ceiling: float) -> SpeedCell:
    ratio_low, ratio, ratio_high = np.quantile(np.array(times[0]) / np.array(times[1]), (0.25, 0.5, 0.75))
    base, linear = (
        Timing(*(round(float(q) * 1e3, 4) for q in np.quantile(t, (0.5, 0.25, 0.75)))) for t in times
    )
    resolved = bool(ratio_low > 1 or ratio_high < 1)
    return SpeedCell(
        phase, context, base, linear, float(ratio), float(ratio_low), float(ratio_high), resolved, ceiling
    )


def _ceiling(phase: str, context: int, costs: Sequence[GraphCost]) -> float:
    base, linear = (c.prefill_macs(context) if phase == "prefill" else c.decode_bytes(context) for c in costs)
    return base / linear
