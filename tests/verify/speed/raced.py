"""Candidates that say how long they take, and races of them: what the tests of several modules race."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbl_export.verify.speed.candidates import Candidate, Memory
from nbl_export.verify.speed.race import Harness, Rounds
from nbl_export.verify.speed.values import CellResult, GraphCost, Machine, Roofline, Speed

ROOFLINE = Roofline("cpu", "float32", 2, 1e9, 1e9)
COST = GraphCost(1000, 10, 4000, 40, 200, 800)
HALF = GraphCost(800, 5, 3200, 20, 200, 800)
EMPTY = Memory()
MACHINE = Machine("cpu", 2, roofline=ROOFLINE)
# Of which no figure is another's multiple.
UNEVEN = GraphCost(
    weight_macs=100,
    attention_macs_per_context=3,
    weight_bytes=400,
    kv_bytes_per_token=7,
    last_macs=60,
    last_bytes=240,
)


class Timed:
    """A candidate that says how long it takes."""

    def __init__(self, prefill: float, step: float, cache: int = 100) -> None:
        self.seconds, self.cache = {"prefill": prefill, "decode": step}, cache

    def prefill(self) -> None: ...

    def rewind(self) -> None: ...

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        return self.cache


def lasting(*seconds: float) -> Callable[[int, int], Any]:
    return lambda context, batch: Timed(*seconds)


PAIR = [
    Candidate("base", lasting(2.0, 0.2), cost=COST),
    Candidate("linearized", lasting(1.6, 0.1), "base", cost=HALF),
    Candidate("other", lasting(4.0, 0.05)),
]


def raced(
    cells: list[tuple[int, int]],
    candidates: list[Candidate] = PAIR,
    memory: Memory = EMPTY,
    positions: int | None = None,
    rounds: Rounds = Rounds(6, 9),  # noqa: B008
) -> Speed:
    return Harness(candidates, MACHINE, rounds, memory=memory, positions=positions).measure(cells)


def ran(*arguments: Any, **more: Any) -> tuple[CellResult, ...]:
    return raced(*arguments, **more).cells
