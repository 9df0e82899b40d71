"""A bench as one JSON value with a versioned schema, and what is drawn from it: table, plot, Markdown, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.report.drawing import Table, number
from nbl_export.report.schema import Check, load_judged
from nbl_export.report.tables import checks_table, roofline_in_words, spread
from nbl_export.workspace import jsonable, write_json, write_text

if TYPE_CHECKING:
    from nbl_export.report.plots import Plot

SCHEMA = "nbl-export/bench/1"
REMEDY = "run `nbl-export bench` again"


@dataclass(frozen=True)
class BenchReport:
    """Everything that ``nbl-export bench`` measured: one entry of ``cells`` for each phase, batch and context."""

    created: str
    tool_version: str
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]
    roofline: Mapping[str, Any]
    competitors: Sequence[Mapping[str, Any]]
    cells: Sequence[Mapping[str, Any]]
    checks: Sequence[Check]
    notes: Sequence[str]

    @property
    def passed(self) -> bool:
        return all(c.status != "failed" for c in self.checks)

    def body(self) -> dict[str, Any]:
        """As it stands in a report."""
        return dict(jsonable(asdict(self)))

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "verdict": "passed" if self.passed else "failed", **self.body()}


def load_bench(path: Path) -> BenchReport:
    """Read ``bench.json``; raises :class:`InputError` for anything else."""
    return load_judged(BenchReport, path, "bench", SCHEMA, REMEDY)


def bench_of(raw: Mapping[str, Any]) -> BenchReport:
    """A bench as it stands in a report."""
    return BenchReport(**{**raw, "checks": [Check(**c) for c in raw["checks"]]})


def bench_checks(cells: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The two verdicts on cells as JSON: whether the figures can be believed, and whether anything got slower."""
    suspect, slower, resolved = [], [], []
    for cell in cells:
        title = cell_name(cell["phase"], cell["batch"], cell["context"])
        suspect += [
            f"{title}, {name}: {e['saved_ms']:.2f} ms saved at least, {e['excess_ms']:.2f} of them beyond the ceiling, "
            f"but {e['gone_ms']:.2f} in nodes that are gone"
            for name, e in cell["explanations"].items()
            if e["suspect"]
        ]
        for lap in cell["laps"]:
            if found := lap["over_base"]:
                resolved.append(found["resolved"])
                if found["resolved"] and found["value"] < 1:
                    slower.append(f"{title}, {lap['name']}: {found['value']:.2f}×")
    return [
        Check(
            "ceilings",
            "failed" if suspect else "passed",
            "; ".join(suspect)
            or "no speedup above its ceiling, or what it comes from is gone from the graph",
        ),
        Check(
            "nowhere slower",
            "failed" if slower else "passed" if any(resolved) else "skipped",
            "; ".join(slower)
            or f"{sum(resolved)} of {len(resolved)} comparisons with the own base are resolved",
        ),
    ]


def cell_name(phase: str, batch: int, context: int) -> str:
    rows = f"{batch} × " if batch > 1 else ""
    return f"{phase} {rows}{context:,}"


def bench_table(value: BenchReport, brief: bool = False) -> Table:
    """A row for every competitor in every cell; ``brief`` keeps what 80 columns hold."""
    rows: list[tuple[str, ...]] = []
    for cell in value.cells:
        title = cell_name(cell["phase"], cell["batch"], cell["context"])
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
            where.setdefault((name, why), []).append(cell_name(cell["phase"], cell["batch"], cell["context"]))
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


def explanations_table(value: BenchReport) -> Table | None:
    """Where speedups above their ceilings come from; None if there are none."""
    rows = tuple(
        (
            cell_name(cell["phase"], cell["batch"], cell["context"]),
            name,
            f"{e['base_nodes']:,} → {e['linearized_nodes']:,}",
            ", ".join(f"{op} {number(ms, '.2f')}" for op, ms in e["by_operator_ms"].items()),
            number(e["saved_ms"], ".2f"),
            number(e["excess_ms"], ".2f"),
            number(e["gone_ms"], ".2f"),
        )
        for cell in value.cells
        for name, e in cell["explanations"].items()
    )
    if not rows:
        return None
    return Table(
        "Speedups above their ceilings",
        (
            "",
            "who",
            "nodes run",
            "saved by operator, ms",
            "saved at least, ms",
            "beyond the ceiling",
            "in nodes gone",
        ),
        rows,
        "What the race saved at least, by its 95 % interval, and where ONNX Runtime's profiler sees it. A cell is "
        "suspect where more than half of what was saved beyond the ceiling, and a tenth of all that was saved, is not "
        "in nodes that are gone.",
    )


def bench_tables(value: BenchReport, brief: bool = False) -> list[Table]:
    found = [bench_table(value, brief)]
    explained = None if brief else explanations_table(value)
    return [*found, *([explained] if explained else [])]


def bench_plot(value: BenchReport) -> Plot:
    """Speedups over the base graph of everybody, by cell."""
    from nbl_export.report.figures import draw_bench
    from nbl_export.report.plots import Plot

    told = []
    for cell in value.cells:
        own = next((x for x in cell["laps"] if x["name"] == "linearized" and x["over_base"]), None)
        if own:
            name = cell_name(cell["phase"], cell["batch"], cell["context"])
            told.append(f"{name} {number(own['over_base']['value'], '.2f')}×")
    return Plot(
        "bench",
        f"Linearized over base: {', '.join(told) or 'nowhere timed'}.",
        "How many times as fast as the base graph; higher is faster. Whiskers: 95 % intervals. Hollow: not resolved "
        "from noise. Dash: the ceiling of the linearized graph.",
        partial(draw_bench, value.cells),
    )


def write_bench(folder: Path, value: BenchReport) -> list[Path]:
    """Write ``bench.json``, ``bench.md`` and ``plots/bench.png`` into ``folder``, each atomically."""
    from nbl_export.report.render import markdown_page, write_plot
    from nbl_export.report.summary import measured_on

    paths = [folder / "bench.json", folder / "bench.md", folder / "plots" / "bench.png"]
    plot = bench_plot(value)
    write_json(paths[0], value.as_json())
    made = f"Made {value.created} with nbl-export {value.tool_version}."
    title, tables = f"nbl-export bench: {value.model['source']}", [checks_table(value), *bench_tables(value)]
    page = markdown_page(title, tables, [made, measured_on(value.environment)], value.notes, {"bench": plot})
    write_text(paths[1], page)
    write_plot(paths[2], plot)
    return paths
