"""How fast the graph is with K linear layers: the baseline rewritten for a few K, each timed against it in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.blocks import Block
from nbl_export.errors import BudgetError
from nbl_export.progress import Listener
from nbl_export.settings.workload import Workload
from nbl_export.stages.select.trial import trial_graph, why_not_timed

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan, Replacement
    from nbl_export.workspace import Workspace

# The prompt that K curves are timed with, and the rounds of base and linearized in turn.
CONTEXT, ROUNDS = 512, 5


@dataclass(frozen=True)
class Speedups:
    """Of the graph with K linear layers over the unmodified one; ``decode`` is None without a KV cache.

    For a ``workload`` it is that one alone.
    """

    prefill: float | None
    decode: float | None
    workload: float | None = None

    @property
    def least(self) -> float:
        return min(x for x in (self.prefill, self.decode, self.workload) if x is not None)


class SpeedMeter:
    """Measures K by K, each once; ``plan`` is one without layers, ``layers(k)`` are the maps of K.

    Timed are ``workloads`` or, where there are none, a prefill and a decode.
    """

    def __init__(
        self,
        ws: Workspace,
        plan: Plan,
        layers: Callable[[int], Mapping[Block, Replacement]],
        positions: int | None,
        listener: Listener,
        workloads: Sequence[Workload] = (),
    ) -> None:
        self._ws, self._plan, self._layers, self._listener = ws, plan, layers, listener
        self._workloads = workloads
        self.context = None if workloads else min(CONTEXT, (positions or CONTEXT + 1) - 1)
        self.found: dict[int, Speedups] = {}

    @property
    def missing(self) -> str | None:
        """Why nothing can be timed; None if it can."""
        return why_not_timed(self._ws)

    def __call__(self, k: int) -> Speedups:
        from nbl_export.verify.speed.pair import Pair, anew_or_why_not, measure_speed
        from nbl_export.verify.speed.workloads import workload_ms

        if k not in self.found:
            base, listener = self._ws.baseline, self._listener
            with trial_graph(self._ws, self._plan, self._layers(k), f"k{k}", listener) as graph:
                anew = anew_or_why_not(base, graph) is not False
                if self.context is None:
                    took = workload_ms(base, {LINEARIZED: graph}, self._workloads, listener, anew)
                    self.found[k] = Speedups(None, None, took[BASE] / took[LINEARIZED])
                else:
                    speed = measure_speed(Pair(base, graph), [self.context], ROUNDS, listener, anew)
                    by_phase = {cell.phase: over.value for cell, _, over in speed.speedups()}
                    self.found[k] = Speedups(by_phase["prefill"], by_phase.get("decode"))
        return self.found[k]

    def least_k(self, wanted: float, most: int) -> int:
        """The smallest K up to ``most`` that is ``wanted`` times as fast in prefill and decode, by bisection.

        What K layers save grows with K. Raises :class:`BudgetError` if not even ``most`` are enough.
        """
        if (best := self(most).least) < wanted:
            where = "for the workload" if self.context is None else f"at {self.context} tokens"
            raise BudgetError(
                f"--min-speedup {wanted:g} is out of reach {where}: {most} linear layers are "
                f"{best:.2f} times as fast as none: ask for less, or allow more loss."
            )
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle).least >= wanted else (middle, high)
        return high


def points_of(ks: Sequence[int], chosen: int) -> Sequence[int]:
    """Those of the ``ks`` of a curve that are timed: a few, evenly up to the last, and the one that was chosen."""
    evenly = (ks[-1] * part / 4 for part in range(1, 5))
    return sorted(
        {min(ks, key=lambda k: abs(k - round(at))) for at in evenly} | ({chosen} if chosen else set())
    )
