"""How long workloads take in graphs, measured: the graphs race in each prefill and each decode of the workloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nbl_export.batch.names import BASE
from nbl_export.progress import Listener
from nbl_export.settings.workload import Workload
from nbl_export.verify.speed.candidates import Candidate, Prompt, graph_candidate
from nbl_export.verify.speed.race import Harness, Rounds
from nbl_export.verify.speed.roofline import cpu_machine
from nbl_export.verify.speed.values import DECODE, PREFILL, Machine, Speed

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
