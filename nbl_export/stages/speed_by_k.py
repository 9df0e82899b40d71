"""Time the graph with the K best layers replaced, for the K curve and for ``--min-speedup``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nbl_export.blocks import Block
from nbl_export.errors import BudgetError
from nbl_export.files import TEMPORARY
from nbl_export.graph.io import load_graph, save_beside
from nbl_export.graph.rounding import UNTIMED, needs_emulation
from nbl_export.linearize.plan import Plan, ranks_of
from nbl_export.models.layers import positions
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.stages.measuring import Measuring
from nbl_export.verify.speed import pair

# The prompt that K curves are timed with, and the rounds of base and linearized in turn.
CONTEXT, ROUNDS = 512, 5
# The best blocks that replace at most K attentions and MLPs, for any K.
Prefix = Callable[[int], Sequence[Block]]


class SpeedMeter:
    """Times the graph with K linear layers over the unmodified one, each K once: for the workloads of the settings or,
    without any, for a prefill and a decode. ``empty`` is a plan without layers, ``prefix`` has the layers of K.
    """

    def __init__(self, of: Measuring, empty: Plan, prefix: Prefix) -> None:
        self._of, self._empty, self._prefix, self._workloads = of, empty, prefix, of.settings.workloads
        limit = positions(of.run.model.model) or CONTEXT + 1
        self.context = None if self._workloads else min(CONTEXT, limit - 1)
        self.found: dict[int, dict[str, Any]] = {}  # by the names of a point of the curve

    def missing(self) -> str | None:
        """Why nothing can be timed; None if it can."""
        ws = self._of.run.workspace
        exported = ws.current("export")
        if exported is None or exported.dropped:
            return f"the model is not exported yet (nbl-export export {ws.root})"
        if needs_emulation(load_graph(ws.baseline)):
            return UNTIMED
        why = pair.anew_or_why_not(ws.baseline, ws.baseline)
        return why if isinstance(why, str) else None

    def __call__(self, k: int) -> dict[str, Any]:
        if k not in self.found:
            base, listener = self._of.run.workspace.baseline, self._of.listener
            with self._rewritten(k) as graph:
                anew = pair.anew_or_why_not(base, graph) is not False
                if self.context is None:
                    own, other = pair.workload_ms(base, graph, self._workloads, listener, anew)
                    self.found[k] = {"timed_speedup": own / other}
                else:
                    speed = pair.measure_speed(base, graph, [self.context], ROUNDS, listener, anew)
                    self.found[k] = {
                        f"{cell.phase}_speedup": over.value for cell, _, over in speed.speedups()
                    }
        return self.found[k]

    def least(self, k: int) -> float:
        """The least speedup of K layers."""
        return float(min(self(k).values()))

    @contextmanager
    def _rewritten(self, k: int) -> Iterator[Path]:
        """The exported graph with K layers replaced, gone afterwards; it reads other weights of the unmodified one."""
        ws = self._of.run.workspace
        graph, data = (ws.root / f"k{k}.{what}{TEMPORARY}" for what in ("onnx", "data"))
        try:
            plan = self._empty.with_replaced(self._of.fitting.timed(self._prefix(k)))
            plan = replace(plan, ranks=ranks_of(plan.layers))
            rewrite_file(ws.baseline, plan, graph, self._of.listener, partial(save_beside, data=data.name))
            yield graph
        finally:
            graph.unlink(missing_ok=True)
            data.unlink(missing_ok=True)

    def least_k(self, wanted: float, most: int) -> int:
        """The smallest K up to ``most`` that is ``wanted`` times as fast in prefill and decode, by bisection.

        What K layers save grows with K. Raises :class:`BudgetError` if not even ``most`` are enough.
        """
        if (best := self.least(most)) < wanted:
            where = "for the workload" if self.context is None else f"at {self.context} tokens"
            raise BudgetError(
                f"--min-speedup {wanted:g} is out of reach {where}: {most} linear layers are "
                f"{best:.2f} times as fast as none: ask for less, or allow more loss."
            )
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.least(middle) >= wanted else (middle, high)
        return high
