"""Time the graph with K linear layers: the baseline rewritten for a few K, each raced against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nbl_export.blocks import Block
from nbl_export.errors import BudgetError
from nbl_export.files import TEMPORARY
from nbl_export.graph.io import load_graph, save_beside
from nbl_export.graph.rounding import UNTIMED, needs_emulation
from nbl_export.linearize.plan import Plan, Replacement, ranks_of
from nbl_export.progress import Listener
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings.making import Workload
from nbl_export.verify.speed import pair
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
        exported = self._ws.current("export")
        if exported is None or exported.dropped:
            return f"the model is not exported yet (nbl-export export {self._ws.root})"
        if needs_emulation(load_graph(self._ws.baseline)):
            return UNTIMED
        why = pair.anew_or_why_not(self._ws.baseline, self._ws.baseline)
        return why if isinstance(why, str) else None

    def __call__(self, k: int) -> Speedups:
        if k not in self.found:
            base, listener = self._ws.baseline, self._listener
            with self._rewritten(k) as graph:
                anew = pair.anew_or_why_not(base, graph) is not False
                if self.context is None:
                    own, other = pair.workload_ms(base, graph, self._workloads, listener, anew)
                    self.found[k] = Speedups(None, None, own / other)
                else:
                    speed = pair.measure_speed(base, graph, [self.context], ROUNDS, listener, anew)
                    by_phase = {cell.phase: over.value for cell, _, over in speed.speedups()}
                    self.found[k] = Speedups(by_phase["prefill"], by_phase.get("decode"))
        return self.found[k]

    @contextmanager
    def _rewritten(self, k: int) -> Iterator[Path]:
        """The exported graph with K layers replaced, gone afterwards; it reads other weights of the unmodified one."""
        graph, data = (self._ws.root / f"k{k}.{what}{TEMPORARY}" for what in ("onnx", "data"))
        try:
            write = partial(save_beside, data=data.name)
            plan = self._plan.with_replaced(self._layers(k))
            plan = replace(plan, ranks=ranks_of(plan.layers))
            rewrite_file(self._ws.baseline, plan, graph, self._listener, write)
            yield graph
        finally:
            graph.unlink(missing_ok=True)
            data.unlink(missing_ok=True)

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
