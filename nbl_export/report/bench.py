"""A bench as one JSON value with a versioned schema, and what is drawn from it: tables and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nbl_export.checks import Check
from nbl_export.records import from_json, to_json
from nbl_export.report.drawing import Table, number
from nbl_export.report.header import Header, load_judged
from nbl_export.report.speed import ABOVE, explanations_tables, roofline_in_words, spread
from nbl_export.verify.speed.checks import Explained, ceilings_check

# The base graph in a second session: who times it, and the tables.
CONTROL = "base again"
# Of the speedup measured, what may be the luck of a session: where it lies in memory.
_UNLIKE = 0.5
REMEDY = "run `nbl-export bench` again"


@dataclass(frozen=True)
class BenchReport(Header):
    """Everything that ``nbl-export bench`` measured: one entry of ``cells`` for each phase, batch and context."""

    SCHEMA: ClassVar[str] = "nbl-export/bench/1"

    settings: Mapping[str, Any]
    roofline: Mapping[str, Any]
    competitors: Sequence[Mapping[str, Any]]
    cells: Sequence[Mapping[str, Any]]

    def body(self) -> dict[str, Any]:
        """As it stands in a report."""
        return to_json(self)


def load_bench(path: Path) -> BenchReport:
    """Read ``bench.json``; raises :class:`InputError` for anything else."""
    return load_judged(BenchReport, path, "bench", REMEDY)


def bench_of(raw: Mapping[str, Any]) -> BenchReport:
    """A bench as it stands in a report."""
    return from_json(BenchReport, raw, "The report's bench", REMEDY)


def bench_checks(cells: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Verdicts on cells as JSON: whether the figures can be believed, and whether anything got slower."""
    slower, resolved = [], []
    for cell in cells:
        for lap in cell["laps"]:
            if found := lap["over_base"]:
                resolved.append(found["resolved"])
                if found["resolved"] and found["value"] < 1:
                    slower.append(f"{cell_name(cell)}, {lap['name']}: {found['value']:.2f}×")
    return [
        ceilings_check("ceilings", _explained(cells), "failed"),
        Check(
            "nowhere slower",
            "failed" if slower else "passed" if any(resolved) else "skipped",
            "; ".join(slower)
            or f"{sum(resolved)} of {len(resolved)} comparisons with the own base are resolved",
        ),
        _control_check(cells),
    ]


def _control_check(cells: Sequence[Mapping[str, Any]]) -> Check:
    """Whether the base graph, in the race twice, is as fast both times, as far as the effect measured goes."""
    unlike, compared = [], 0
    for cell in cells:
        over = {lap["name"]: lap["beaten"] for lap in cell["laps"]}
        first, again = over.get("base"), over.get(CONTROL)
        if not (first and again):
            continue
        compared += 1
        apart = first["least"] > again["most"] or again["least"] > first["most"]
        if apart and abs(first["value"] - again["value"]) > _UNLIKE * abs(first["value"] - 1):
            unlike.append(
                f"{cell_name(cell)}: linearized is {first['value']:.2f}× as fast as the base graph, "
                f"{again['value']:.2f}× as fast as the same graph in another session"
            )
    return Check(
        "same graph twice",
        "failed" if unlike else "passed" if compared else "skipped",
        "; ".join(unlike) or f"the base graph is as fast in a second session, in {compared} cells",
    )


def _explained(cells: Sequence[Mapping[str, Any]]) -> list[Explained]:
    return [
        (cell_name(cell), name, reason) for cell in cells for name, reason in cell["explanations"].items()
    ]


def cell_name(cell: Mapping[str, Any]) -> str:
    rows = f"{cell['batch']} × " if cell["batch"] > 1 else ""
    return f"{cell['phase']} {rows}{cell['context']:,}"


def bench_table(value: BenchReport, brief: bool = False) -> Table:
    """A row for every competitor in every cell; ``brief`` keeps what 80 columns hold."""
    rows: list[tuple[str, ...]] = []
    for cell in value.cells:
        title = cell_name(cell)
        for i, lap in enumerate(cell["laps"]):
            over, limit = lap["over_base"], lap["ceiling"]
            row = [
                title if i == 0 or not brief else "",
                lap["name"],
                spread(lap["timing"]),
                f"{lap['tokens_per_second']:,.0f}",
                _ratio(over),
                number(limit, ".2f") if limit else "",
            ]
            if not brief:
                row += [
                    f"{over['value'] / limit:.2f}" if over and limit else "",
                    f"{lap['of_roofline']:.0%}" if lap["of_roofline"] else "",
                    _ratio(lap["beaten"]),
                    f"{lap['cache_bytes'] / 2**20:,.1f}",
                    f"{lap['peak_bytes'] / 2**20:,.0f}" if lap["peak_bytes"] else "",
                    str(lap["rounds"]),
                ]
            rows.append(tuple(row))
    columns: tuple[str, ...] = ("", "who", "ms", "tokens/s", "over own base", "ceiling")
    if not brief:
        columns += ("÷ ceiling", "of roofline", "linearized over it", "KV MiB", "peak MiB", "rounds")
    return Table("Bench", columns, tuple(rows), _note(value) + _absent(value), plot="bench")


def _absent(value: BenchReport) -> str:
    """Who was not timed where, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in value.cells:
        for name, why in cell["absent"].items():
            where.setdefault((name, why), []).append(cell_name(cell))
    return "".join(
        f" Not timed: {name} in {', '.join(cells)} ({why})." for (name, why), cells in where.items()
    )


def _note(value: BenchReport) -> str:
    rounds = value.settings["rounds"]
    return (
        f"All in turn in one process, {rounds} rounds and more where needed; medians ± half the interquartile range. "
        "Prefill from an empty cache, its time is that to the first token; decode: one token a row after that many, "
        "the cache really filled. Ceiling: what multiplications and bytes, counted from the graphs, allow on "
        f"{roofline_in_words(value.roofline)}. ~: not resolved, the noise exceeds the effect. Peak: of a process that "
        "does only this."
    )


def _ratio(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    return f"{number(found['value'], '.2f')}×" + ("" if found["resolved"] else " ~")


def bench_tables(value: BenchReport, brief: bool = False) -> list[Table]:
    above = [] if brief else explanations_tables(_explained(value.cells), f"Bench: {ABOVE.lower()}")
    return [bench_table(value, brief), *above]
