"""Time base and linearized graph in ONNX Runtime on the CPU, one row, as `verify` and the K curve do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.machine import free_memory
from nbl_export.progress import Listener
from nbl_export.runtime.session import fit, require_onnxruntime, session_bytes
from nbl_export.verify.speed.candidates import RunGraph, graph_candidate
from nbl_export.verify.speed.checks import speed_check
from nbl_export.verify.speed.race import MORE, Harness, Rounds
from nbl_export.verify.speed.roofline import cpu_machine
from nbl_export.verify.speed.values import DECODE, PREFILL, GraphCost, Speed

if TYPE_CHECKING:
    from nbl_export.verify.case import Case
    from nbl_export.verify.measurement import Measurement


@dataclass(frozen=True)
class Pair:
    """Both graphs; ``phases`` are the decoder's own unless they are given; ``run`` runs a cell in a session."""

    base: Path
    linearized: Path
    phases: tuple[str, ...] = ()
    run: RunGraph | None = None


IN_TURNS = "Both graphs do not fit into memory together: for its speed each is loaded anew in every round."


def anew_or_why_not(*graphs: Path) -> bool | str:
    """Whether the sessions of ``graphs`` are made in turns, since not all fit; or why not even one does."""
    each = [session_bytes(graph) for graph in graphs]
    if not fit(max(each)):
        need, there = (f"{size / 2**30:.1f} GiB" for size in (max(each), free_memory()))
        return f"a session needs about {need}, and {there} are free: use a machine with more memory"
    return not fit(*each)


def measure_speed(
    pair: Pair,
    contexts: Sequence[int],
    rounds: int,
    listener: Listener | None = None,
    anew: bool = False,
) -> Speed:
    """Both graphs of ``pair`` at each context length, ``rounds`` times in turn and more where needed.

    The decode cache is really filled, by a prefill. With ``anew`` one session is in memory at a time. Raises what a
    graph that does not run raises.
    """
    require_onnxruntime()
    base = graph_candidate(BASE, pair.base, run=pair.run, kept=not anew)
    linearized = graph_candidate(LINEARIZED, pair.linearized, BASE, run=pair.run, kept=not anew)
    harness = Harness(
        [base, linearized],
        cpu_machine(),
        Rounds(rounds, MORE * rounds),
        pair.phases or phases_of(base.cost),
        strict=True,
        anew=anew,
    )
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
    why = case.why_not_timed
    if why is None and case.baseline is not None:
        anew = anew_or_why_not(case.baseline, case.rewritten)
        if not isinstance(anew, str):
            pair = Pair(case.baseline, case.rewritten, phases, run)
            speed = measure_speed(pair, contexts, case.settings.rounds, case.listener, anew)
            found.checks.append(speed_check(speed))
            found.notes += [IN_TURNS] * anew
            return speed
        why = anew
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
