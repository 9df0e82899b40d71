"""Time base and linearized graph in ONNX Runtime on the CPU, and how long workloads take in graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.machine import free_memory
from nbl_export.progress import Listener
from nbl_export.runtime.session import fit, require_onnxruntime, session_bytes
from nbl_export.settings.workload import Workload
from nbl_export.verify.speed.candidates import Candidate, Prompt, RunGraph, graph_candidate
from nbl_export.verify.speed.checks import speed_check
from nbl_export.verify.speed.race import MORE, Harness, Rounds
from nbl_export.verify.speed.roofline import cpu_machine
from nbl_export.verify.speed.values import DECODE, PREFILL, GraphCost, Machine, Speed

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


# workloads ----------------------------------------------------------------------------------------

# Rounds of each cell, as many as fit into so many seconds, of which three are always run.
ROUNDS, SECONDS = 9, 120.0


def workload_ms(
    base: Path,
    others: Mapping[str, Path],
    workloads: Sequence[Workload],
    listener: Listener | None = None,
    anew: bool = False,
) -> dict[str, float]:
    """Milliseconds of the ``workloads``, weighted, in the graph ``base`` and in each of ``others`` by their names.

    Those of ``base`` are medians; those of another are these, divided by the median ratio of both in the same round.
    With ``anew`` one session is in memory at a time. Raises what a graph that does not run raises.
    """
    candidates = [
        graph_candidate(BASE, base, kept=not anew),
        *(graph_candidate(name, path, BASE, kept=not anew) for name, path in others.items()),
    ]
    machine = cpu_machine()
    prefills = {(w.batch, w.prefill) for w in workloads if w.prefill}
    decodes = {(w.batch, w.middle) for w in workloads if w.decode}
    # One that is made anew has had its prefill before it is measured.
    decoding = candidates if anew else [_filled(c) for c in candidates]
    took = {
        **_took(candidates, machine, PREFILL, prefills, listener, anew),
        **_took(decoding, machine, DECODE, decodes, listener, anew),
    }
    found = {}
    for candidate in candidates:
        name = candidate.name
        found[name] = sum(
            w.weight
            * (
                (took[PREFILL, w.batch, w.prefill][name] if w.prefill else 0.0)
                + (w.decode * took[DECODE, w.batch, w.middle][name] if w.decode else 0.0)
            )
            for w in workloads
        )
    return found


def _took(
    candidates: Sequence[Candidate],
    machine: Machine,
    phase: str,
    cells: set[tuple[int, int]],
    listener: Listener | None,
    anew: bool,
) -> dict[tuple[str, int, int], dict[str, float]]:
    """Milliseconds of each candidate by phase, rows and tokens."""
    if not cells:
        return {}
    rounds = Rounds(ROUNDS, ROUNDS, SECONDS)
    race = Harness(candidates, machine, rounds, (phase,), candidates[-1].name, strict=True, anew=anew)
    speed: Speed = race.measure(sorted(cells), listener)
    found = {}
    for cell in speed.cells:
        base = cell.of(BASE)
        assert base is not None
        took = {
            r.name: base.timing.median_ms / (r.over_base.value if r.over_base else 1.0) for r in cell.results
        }
        found[phase, cell.batch, cell.context] = took
    return found


def _filled(candidate: Candidate) -> Candidate:
    """``candidate`` with its cache filled by a prefill, for a race that has decode alone."""

    def make(context: int, batch: int) -> Prompt:
        prompt = candidate.make(context, batch)
        prompt.prefill()
        return prompt

    return replace(candidate, make=make)
