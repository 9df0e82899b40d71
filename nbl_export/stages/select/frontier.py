"""How fast the graph is with K linear layers: the baseline rewritten for a few K, each timed against it in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.blocks import Block
from nbl_export.errors import BudgetError
from nbl_export.files import TEMPORARY
from nbl_export.progress import Listener

if TYPE_CHECKING:
    from nbl_export.linearize.plan import LinearLayer, Plan
    from nbl_export.workspace import Workspace

# The prompt that K curves are timed with, and the rounds of base and linearized in turn.
CONTEXT, ROUNDS = 512, 5


@dataclass(frozen=True)
class Speedups:
    """Of the graph with K linear layers over the unmodified one; ``decode`` is None without a KV cache."""

    prefill: float
    decode: float | None

    @property
    def least(self) -> float:
        return self.prefill if self.decode is None else min(self.prefill, self.decode)


class SpeedMeter:
    """Measures K by K, each once; ``plan`` is one without layers, ``layers(k)`` are the maps of K."""

    def __init__(
        self,
        ws: Workspace,
        plan: Plan,
        layers: Callable[[int], Mapping[Block, LinearLayer]],
        positions: int | None,
        listener: Listener,
    ) -> None:
        self._ws, self._plan, self._layers, self._listener = ws, plan, layers, listener
        self.context = min(CONTEXT, (positions or CONTEXT + 1) - 1)
        self.found: dict[int, Speedups] = {}

    @property
    def missing(self) -> str | None:
        """Why nothing can be timed; None if it can."""
        from nbl_export.graph.half_emulation import UNTIMED, needs_emulation
        from nbl_export.graph.io import load_graph
        from nbl_export.verify.speed.pair import Pair, anew_or_why_not

        exported = self._ws.current("export")
        if exported is None or exported.dropped:
            return f"the model is not exported yet (nbl-export export {self._ws.root})"
        if needs_emulation(load_graph(self._ws.baseline)):
            return UNTIMED
        why = anew_or_why_not(Pair(self._ws.baseline, self._ws.baseline))
        return why if isinstance(why, str) else None

    def __call__(self, k: int) -> Speedups:
        from nbl_export.verify.speed.pair import Pair, anew_or_why_not, measure_speed

        if k not in self.found:
            with self._rewritten(k) as graph:
                pair = Pair(self._ws.baseline, graph)
                anew = anew_or_why_not(pair) is not False
                speed = measure_speed(pair, [self.context], ROUNDS, self._listener, anew)
            by_phase = {cell.phase: over.value for cell, _, over in speed.speedups()}
            self.found[k] = Speedups(by_phase["prefill"], by_phase.get("decode"))
        return self.found[k]

    @contextmanager
    def _rewritten(self, k: int) -> Iterator[Path]:
        """The graph with K linear layers; all other weights it reads from where the unmodified one has them."""
        from nbl_export.graph.io import save_beside
        from nbl_export.rewrite.replace import rewrite_file

        plan = replace(self._plan, layers=self._layers(k))
        graph, data = (self._ws.root / f"k{k}.{what}{TEMPORARY}" for what in ("onnx", "data"))
        try:
            rewrite_file(self._ws.baseline, plan, graph, self._listener, partial(save_beside, data=data.name))
            yield graph
        finally:
            graph.unlink(missing_ok=True)
            data.unlink(missing_ok=True)

    def least_k(self, wanted: float, most: int) -> int:
        """The smallest K up to ``most`` whose prefill and decode are ``wanted`` times as fast, by bisection.

        What K layers save grows with K. Raises :class:`BudgetError` if not even ``most`` are enough.
        """
        if (best := self(most).least) < wanted:
            raise BudgetError(
                f"--min-speedup {wanted:g} is out of reach at {self.context} tokens: {most} linear layers are "
                f"{best:.2f} times as fast as none: ask for less, or allow more loss."
            )
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle).least >= wanted else (middle, high)
        return high


def points_of(most: int, chosen: int) -> Sequence[int]:
    """The K's of a curve up to ``most`` that are timed: a few, evenly, and the one that was chosen."""
    return sorted({max(1, round(most * part / 4)) for part in range(1, 5)} | ({chosen} if chosen else set()))
