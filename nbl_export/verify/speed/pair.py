"""Time base and linearized graph in ONNX Runtime on the CPU, and workloads in them, and PyTorch; judge speedups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbl_export.machine import free_memory
from nbl_export.models.running import accepted_arguments, cache_argument
from nbl_export.models.weights import device_of
from nbl_export.progress import Listener
from nbl_export.records import Check
from nbl_export.runtime.session import CPU, fit, session_bytes
from nbl_export.settings.making import Workload
from nbl_export.verify.speed.candidates import (
    DEVICES,
    Candidate,
    OrtPrompt,
    Prompt,
    RunGraph,
    loaded,
    timed_row,
)
from nbl_export.verify.speed.ceiling import cpu_machine, graph_cost
from nbl_export.verify.speed.race import MORE, Harness, Rounds
from nbl_export.verify.speed.values import CONTROL, DECODE, PREFILL, GraphCost, Speed
from nbl_export.workspace import BASE, LINEARIZED

if TYPE_CHECKING:
    from nbl_export.verify.case import Case, Measurement

IN_TURNS = "Both graphs do not fit into memory together: for its speed each is loaded anew in every round."
# Rounds of each cell of a workload, as many as fit into so many seconds, of which three are always run.
ROUNDS, SECONDS = 9, 120.0
# Of the speedup measured, what may be the luck of a session: where it lies in memory.
_UNLIKE = 0.5


def graph_candidate(
    name: str,
    path: Path,
    base: str | None = None,
    provider: str = CPU,
    run: RunGraph | None = None,
    kept: bool = True,
) -> Candidate:
    """The graph at ``path`` in ONNX Runtime, with what it costs; its session is ``kept``, ``run`` makes a cell."""
    made = cache(loaded) if kept else loaded

    def make(context: int, batch: int) -> Prompt:
        model = made(path, provider)
        return (run or partial(OrtPrompt, device=DEVICES[provider]))(model, context, batch)

    return Candidate(name, make, base, path, graph_cost(path))


class TorchPrompt(Prompt):
    """PyTorch with transformers' own cache; ``forward`` is the model, or a compiled form of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        context: int,
        batch: int = 1,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self._forward, self._name = forward or model, cache_argument(model)
        row = torch.from_numpy(timed_row(context).astype(np.int64))
        self._rows = row.repeat(batch, 1).to(device_of(model))
        self._last = accepted_arguments(model, logits_to_keep=1)
        self._cache: Any = None
        self._steps = 0

    def prefill(self) -> None:
        self._cache, self._steps = None, 0
        self._run(self._rows)

    def rewind(self) -> None:
        if self._cache is None:
            self.prefill()
        if self._steps:
            self._cache.crop(-self._steps)  # the last tokens go
        self._steps = 0

    def step(self) -> None:
        self._run(self._rows[:, :1])
        self._steps += 1

    def _run(self, ids: torch.Tensor) -> None:
        with torch.inference_mode():
            past = {self._name: self._cache} if self._cache is not None else {}
            output = self._forward(input_ids=ids, use_cache=True, **past, **self._last)
        self._cache = output[self._name]
        if ids.device.type == "cuda":
            torch.cuda.synchronize()

    def memory_bytes(self) -> int:
        sides = (side for layer in self._cache.layers for side in (layer.keys, layer.values))
        return sum(side.nbytes for side in sides if side is not None)


def anew_or_why_not(*graphs: Path) -> bool | str:
    """Whether the sessions of ``graphs`` are made in turns, since not all fit; or why not even one does."""
    each = [session_bytes(graph) for graph in graphs]
    if not fit(max(each)):
        need, there = (f"{size / 2**30:.1f} GiB" for size in (max(each), free_memory()))
        return f"a session needs about {need}, and {there} are free: use a machine with more memory"
    return not fit(*each)


def _pair(base: Path, linearized: Path, anew: bool, run: RunGraph | None = None) -> list[Candidate]:
    made = partial(graph_candidate, run=run, kept=not anew)
    return [made(BASE, base), made(LINEARIZED, linearized, BASE)]


def measure_speed(
    base: Path,
    linearized: Path,
    contexts: Sequence[int],
    rounds: int,
    listener: Listener | None = None,
    anew: bool = False,
    phases: tuple[str, ...] = (),
    run: RunGraph | None = None,
) -> Speed:
    """Both graphs at each context length, ``rounds`` times in turn and more where needed.

    The decode cache is really filled, by a prefill. With ``anew`` one session is in memory at a time. ``phases`` are
    the decoder's own unless they are given; ``run`` runs a cell in a session. Raises what a graph that does not run
    raises.
    """
    pair = _pair(base, linearized, anew, run)
    phases, most = phases or phases_of(pair[0].cost), Rounds(rounds, MORE * rounds)
    harness = Harness(pair, cpu_machine(), most, phases, strict=True, anew=anew)
    return harness.measure([(1, context) for context in contexts], listener)


def phases_of(cost: GraphCost | None) -> tuple[str, ...]:
    """Without a cache a token costs what its whole text costs: there is no decode to time."""
    return (PREFILL, DECODE) if cost and cost.kv_bytes_per_token else (PREFILL,)


def verify_speed(
    case: Case,
    found: Measurement,
    contexts: Sequence[int],
    phases: tuple[str, ...] = (),
    run: RunGraph | None = None,
) -> Speed | None:
    """The speed of the case's graph beside the unmodified one, if it is measured, and its verdict.

    Where both do not fit into memory they take turns.
    """
    why: bool | str | None = case.why_not_timed
    if why is None and case.baseline is not None:
        why = anew = anew_or_why_not(case.baseline, case.rewritten)
        if not isinstance(anew, str):
            both, rounds = (case.baseline, case.rewritten), case.settings.rounds
            speed = measure_speed(*both, contexts, rounds, case.listener, anew, phases, run)
            found.checks.append(speed_check(speed))
            found.notes += [IN_TURNS] * anew
            return speed
    found.check("speed", "skipped", str(why))
    return None


def fitting_contexts(
    found: Measurement, limit: int | None, contexts: Sequence[int], room: int = 0
) -> list[int]:
    """Those of ``contexts`` that leave ``room`` more of the model's ``limit`` positions; a note names the others."""
    fitting = [c for c in contexts if limit is None or c + room <= limit]
    if dropped := sorted(set(contexts) - set(fitting)):
        found.notes.append(
            f"Speed at {', '.join(map(str, dropped))} tokens is not measured: the model has {limit} positions."
        )
    return fitting or [max(2, (limit or 16) // 2)]


def workload_ms(
    base: Path,
    linearized: Path,
    workloads: Sequence[Workload],
    listener: Listener | None = None,
    anew: bool = False,
) -> tuple[float, float]:
    """Milliseconds of the ``workloads``, weighted, in the graph ``base`` and in the ``linearized`` one.

    Those of ``base`` are medians; the others are these, divided by the median ratio of both in the same round. With
    ``anew`` one session is in memory at a time. Raises what a graph that does not run raises.
    """
    pair, machine, took = _pair(base, linearized, anew), cpu_machine(), {}
    for phase, cells in (
        (PREFILL, {(w.batch, w.prefill) for w in workloads if w.prefill}),
        (DECODE, {(w.batch, w.middle) for w in workloads if w.decode}),
    ):
        race = Harness(pair, machine, Rounds(ROUNDS, ROUNDS, SECONDS), (phase,), strict=True, anew=anew)
        for cell in race.measure(sorted(cells), listener).cells if cells else ():
            first, second = cell.results
            ms = first.timing.median_ms
            over = second.over_base.value if second.over_base else 1.0
            took[phase, cell.batch, cell.context] = (ms, ms / over)

    def milliseconds(which: int, w: Workload) -> float:
        prefill = took[PREFILL, w.batch, w.prefill][which] if w.prefill else 0.0
        return prefill + (w.decode * took[DECODE, w.batch, w.middle][which] if w.decode else 0.0)

    own, other = (sum(w.weight * milliseconds(which, w) for w in workloads) for which in (0, 1))
    return own, other


# verdicts -----------------------------------------------------------------------------------------


def speed_check(speed: Speed) -> Check:
    """How much of the speedups is more than noise, what is slower, and what is above its ceiling."""
    found = speed.speedups()
    if not found:
        return Check("speed", "skipped", "nothing was timed beside its base")
    slower = [f"{cell.name} {over.value:.2f}×" for cell, _, over in found if over.resolved and over.value < 1]
    said = [
        _above(speed),
        f"{sum(over.resolved for _, _, over in found)} of {len(found)} speedups are resolved",
        *([f"slower: {', '.join(slower)}"] if slower else []),
    ]
    return Check("speed", "passed", "; ".join(said))


def bench_checks(speed: Speed) -> Sequence[Check]:
    """Whether anything got slower, and the base graph is as fast in a second session."""
    every = [(cell, r, over) for cell in speed.cells for r in cell.results if (over := r.over_base)]
    slower = [f"{c.name}, {r.name}: {o.value:.2f}×" for c, r, o in every if o.resolved and o.value < 1]
    resolved = sum(over.resolved for _, _, over in every)
    return (
        Check("ceilings", "passed", _above(speed)),
        Check(
            "nowhere slower",
            "failed" if slower else "passed" if resolved else "skipped",
            "; ".join(slower) or f"{resolved} of {len(every)} comparisons with their base are resolved",
        ),
        _control_check(speed),
    )


def _above(speed: Speed) -> str:
    """How many speedups are certainly above their ceilings, which count products and bytes alone."""
    every = [r.above_ceiling for cell in speed.cells for r in cell.results if r.over_base and r.ceiling]
    if not (count := every.count(True)):
        return "no speedup is certainly above its ceiling"
    return f"{count} of {len(every)} speedups above the ceiling, which counts multiplications and bytes alone"


def _control_check(speed: Speed) -> Check:
    """Whether the base graph, in the race twice, is as fast both times, as far as the effect measured goes."""
    unlike, compared = [], 0
    for cell in speed.cells:
        both = [r.linearized_over for name in (speed.base, CONTROL) if (r := cell.of(str(name)))]
        known = [one for one in both if one and isfinite(one.most)]
        if len(known) < 2:
            continue  # of too few rounds nothing is known
        (first, again), compared = known, compared + 1
        apart = first.least > again.most or again.least > first.most
        if apart and abs(first.value - again.value) > _UNLIKE * abs(first.value - 1):
            unlike.append(
                f"{cell.name}: linearized is {first.value:.2f}× as fast as the base graph, "
                f"{again.value:.2f}× as fast as the same graph in another session"
            )
    return Check(
        "same graph twice",
        "failed" if unlike else "passed" if compared else "skipped",
        "; ".join(unlike) or f"the base graph is as fast in a second session, in {compared} cells",
    )
