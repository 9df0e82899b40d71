"""Everything that a user might run instead, timed in one race: prefill and decode over batch × context.

Each contender is compared with its own base (the graph it was made from), beside the ceiling that both graphs' work
allows on the machine's measured roofline, and the output folder's linearized graph with every other. A speedup over
its ceiling is looked into (:mod:`.profile`): it is explained by operators that are gone, or the cell is suspect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nbl_export.progress import Listener, Silent
from nbl_export.runtime.session import CPU
from nbl_export.verify.speed.candidates import Entrant, decode_seconds, made, prefill_seconds, profiled
from nbl_export.verify.speed.ceiling import GraphCost, ceiling
from nbl_export.verify.speed.profile import explain
from nbl_export.verify.speed.race import Ratio, Rounds, Timing, race, ratio, timing
from nbl_export.verify.speed.roofline import Roofline

PHASES: Mapping[str, Callable[[Any], float]] = {"prefill": prefill_seconds, "decode": decode_seconds}
# Of a machine's free memory; the rest is for what nobody counts.
_USABLE = 0.9


def ordered(cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cells (batch, context) by what attention's scores take in them, each once."""
    return sorted(set(cells), key=lambda cell: (cell[0] * cell[1] ** 2, cell))


@dataclass(frozen=True)
class Competitor:
    """Who takes part: its name, how it is made, the name of its own base, its graph and what that costs."""

    name: str
    entrant: Entrant
    base: str | None = None
    graph: Path | None = None
    cost: GraphCost | None = None


@dataclass(frozen=True)
class Lap:
    """One competitor in one cell. Bytes of the filled cache; ``peak_bytes`` of a process that does only this.

    ``over_base`` compares with its own base and stands beside ``ceiling``; ``of_roofline`` is the share of its time
    that the machine's roofline needs at least; ``beaten`` says how many times as fast the folder's linearized graph is.
    """

    name: str
    timing: Timing
    rounds: int
    tokens_per_second: float
    cache_bytes: int
    peak_bytes: int | None = None
    of_roofline: float | None = None
    over_base: Ratio | None = None
    ceiling: float | None = None
    beaten: Ratio | None = None


@dataclass(frozen=True)
class BenchCell:
    """All competitors in one phase with ``batch`` rows of ``context`` tokens; who was ``absent``, and why."""

    phase: str
    batch: int
    context: int
    laps: tuple[Lap, ...]
    absent: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of each competitor by (batch, context), or why its process did not run that cell.

    ``free`` says how many bytes there are to be had. Without peaks everything fits.
    """

    peaks: Mapping[str, Mapping[tuple[int, int], int | str]] = field(default_factory=dict)
    free: Callable[[], int] = lambda: psutil.virtual_memory().available

    def peak(self, name: str, cell: tuple[int, int]) -> int | None:
        """The peak bytes of one that runs the cell, as far as they were measured."""
        found = self.peaks.get(name, {}).get(cell)
        return found if isinstance(found, int) else None

    def fitting(
        self,
        competitors: Sequence[Competitor],
        cell: tuple[int, int],
        held: dict[str, int],
        absent: dict[str, str],
    ) -> list[Competitor]:
        """Those that fit beside each other, the first before the last; reasons go into ``absent``.

        ``held`` is what each has taken in earlier cells and keeps; it is told what they take in this one.
        """
        largest = max((self.peak(name, cell) or 0 for name in self.peaks), default=0)
        found, left = [], self.free() * _USABLE
        for one in competitors:
            # PyTorch, which has no process of its own, is taken for as large as the largest.
            peak = self.peaks.get(one.name, {}).get(cell, largest)
            if isinstance(peak, str):
                absent[one.name] = peak
                continue
            more = max(0, peak - held.get(one.name, 0))
            if more > left:
                absent[one.name] = f"no room beside the others: it needs {peak / 2**30:.1f} GiB"
            else:
                left -= more
                held[one.name] = max(peak, held.get(one.name, 0))
                found.append(one)
        return found


@dataclass(frozen=True)
class Bench:
    """Who takes part, on which machine, and how long; ``linearized`` is the one that ``beaten`` is about.

    ``positions`` are those of the model: after the last of them there is no token to decode.
    """

    competitors: Sequence[Competitor]
    linearized: str
    rounds: Rounds
    roofline: Roofline
    memory: Memory
    positions: int | None = None

    def run(
        self, cells: Sequence[tuple[int, int]], listener: Listener | None = None
    ) -> Iterator[list[BenchCell]]:
        """Race in every cell (batch, context), prefill and then decode; both are given when they are done.

        From the smallest cell to the largest, since runtimes keep the memory that they once took.
        """
        held: dict[str, int] = {}
        total = len(PHASES) * len(set(cells)) * (self.rounds.least + 1)
        with (listener or Silent()).task("Timing", total, "rounds") as task:
            for batch, context in ordered(cells):
                yield list(self._both(batch, context, held, task.advance))

    def _both(
        self, batch: int, context: int, held: dict[str, int], advance: Callable[[int], None]
    ) -> Iterator[BenchCell]:
        absent: dict[str, str] = {}
        taking = self.memory.fitting(self.competitors, (batch, context), held, absent)
        # Whose session is made first may get the worst memory: that is never to favour the linearized graph.
        order = sorted(taking, key=lambda c: c.name != self.linearized)
        ready = made({c.name: c.entrant for c in order}, context, batch, absent)
        prompts = {c.name: ready[c.name] for c in taking if c.name in ready}
        for phase, measure in PHASES.items():
            if phase == "decode" and context == self.positions:
                advance(self.rounds.least + 1)
                continue
            times = race(prompts, measure, self.rounds, advance, self._resolved, absent)
            prompts = {name: prompts[name] for name in times}
            laps = tuple(
                self._lap(c, phase, batch, context, times, prompts[c.name].memory_bytes())
                for c in taking
                if c.name in times
            )
            yield BenchCell(phase, batch, context, laps, dict(absent))

    def _resolved(self, times: Mapping[str, list[float]]) -> bool:
        pairs = ((str(c.base), c.name) for c in self.competitors)
        return all(ratio(times[b], times[n]).resolved for b, n in pairs if times.get(b) and times.get(n))

    def _lap(
        self,
        competitor: Competitor,
        phase: str,
        batch: int,
        context: int,
        times: Mapping[str, list[float]],
        cache: int,
    ) -> Lap:
        name, own, cost = competitor.name, times[competitor.name], competitor.cost
        shown = timing(own)
        base, champion = times.get(str(competitor.base)), times.get(self.linearized)
        base_cost = next((c.cost for c in self.competitors if c.name == competitor.base), None)
        least = self.roofline.seconds(cost.work(phase, context, batch)) if cost else None
        limit = ceiling(base_cost, cost, self.roofline, phase, context, batch) if base_cost and cost else None
        return Lap(
            name,
            shown,
            len(own),
            1e3 * batch * (1 if phase == "decode" else context) / shown.median_ms,
            cache,
            self.memory.peak(name, (batch, context)),
            None if least is None else 1e3 * least / shown.median_ms,
            ratio(base, own) if base else None,
            limit,
            ratio(own, champion) if champion and name != self.linearized else None,
        )


@dataclass(frozen=True)
class Pair:
    """A graph and the one that it was made from, for a profile; ``base`` is that one's name in the race."""

    base: str
    graphs: tuple[Path, Path]


def pairs_of(competitors: Sequence[Competitor]) -> dict[str, Pair]:
    """Each competitor with a base, by name, where both are graphs."""
    graphs = {c.name: c.graph for c in competitors}
    return {
        c.name: Pair(c.base, (base, c.graph))
        for c in competitors
        if c.base is not None and c.graph is not None and (base := graphs.get(c.base)) is not None
    }


def explained(
    cell: Mapping[str, Any], pairs: Mapping[str, Pair], provider: str = CPU
) -> dict[str, dict[str, Any]]:
    """The reason of each speedup in a ``cell`` (:meth:`BenchCell.as_json`) that is surely above its ceiling.

    To be called when the race is over: what raced has taken the memory that a profile needs.
    """
    ms = {lap["name"]: lap["timing"]["median_ms"] for lap in cell["laps"]}
    run = profiled(cell["context"], cell["batch"], provider)
    found = {}
    for lap in cell["laps"]:
        name, over, limit = lap["name"], lap["over_base"], lap["ceiling"]
        if not (over and limit and name in pairs):
            continue
        pair = pairs[name]
        reason = explain(pair.graphs, cell["phase"], run, ms[pair.base], over["least"], limit, provider)
        if reason:
            found[name] = asdict(reason)
    return found
