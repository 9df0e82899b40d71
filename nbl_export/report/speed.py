"""What a race says: both graphs' times beside their ceilings, and where a speedup above its ceiling comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.report.drawing import Table, number
from nbl_export.verify.speed.checks import Explained, explained_cells, suspect

ABOVE = "Speedups above their ceilings"


def speed_tables(speed: Mapping[str, Any], brief: bool = False) -> list[Table]:
    """Base and linearized graph; then, unless ``brief``, the reasons of speedups above their ceilings."""
    return [speed_table(speed), *([] if brief else explanations_tables(explained_cells(speed)))]


def explanations_tables(found: Sequence[Explained], title: str = ABOVE) -> list[Table]:
    """A table of where speedups above their ceilings come from; none if there are no such."""
    rows = tuple(
        (
            cell,
            who,
            f"{e['base_nodes']:,} → {e['linearized_nodes']:,}",
            ", ".join(f"{op} {number(ms, '.2f')}" for op, ms in e["by_operator_ms"].items()),
            number(e["saved_ms"], ".2f"),
            number(e["excess_ms"], ".2f"),
            number(e["gone_ms"], ".2f"),
        )
        for cell, who, e in found
    )
    if not rows:
        return []
    return [
        Table(
            title,
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
            "suspect where more than half of what was saved beyond the ceiling, and a tenth of all that was saved, is "
            "not in nodes that are gone.",
        )
    ]


def speed_table(speed: Mapping[str, Any]) -> Table:
    """Medians of both graphs and their ratio, beside the ceiling."""
    meaning = "decode: one token after that many"
    if all(c["phase"] == "encode" for c in speed["cells"]):
        meaning = "encode: one pass over that many tokens"
    rows = tuple(
        (
            f"{c['phase']} {c['context']}",
            spread(c["base"]),
            spread(c["linearized"]),
            f"{c['speedup']:.2f}×",
            f"{c['speedup_low']:.2f}–{c['speedup_high']:.2f}" + ("" if c["resolved"] else " not resolved"),
            f"{c['ceiling']:.2f}×" + " suspect" * suspect(c),
        )
        for c in speed["cells"]
    )
    return Table(
        "Speed on ONNX Runtime, batch 1",
        ("", "base, ms", "linearized, ms", "speedup", "quartiles", "ceiling"),
        rows,
        f"{speed['provider']}, {speed['threads']} threads, {speed['rounds']} rounds of base and linearized in turn, "
        f"more where needed; medians ± half the interquartile range; {meaning}. Not resolved: the noise exceeds the "
        "effect, by a 95 % interval of the median. Ceiling: what multiplications and bytes, counted from the graphs, "
        f"allow on {roofline_in_words(speed.get('roofline'))}; what lies above it "
        "was saved in nodes that are gone, as a profile of both graphs shows, or the cell is suspect.",
        plot="speed",
    )


def roofline_in_words(roofline: Mapping[str, Any] | None) -> str:
    """The measured machine; a report of an earlier version has none."""
    if roofline is None:
        return "any machine"
    return (
        f"a machine that does {2e-9 * roofline['macs_per_second']:,.0f} GFLOP/s and reads "
        f"{1e-9 * roofline['bytes_per_second']:,.1f} GB/s, as measured in the same run"
    )


def spread(timing: Mapping[str, float]) -> str:
    """The median and half the interquartile range, in milliseconds."""
    return f"{timing['median_ms']:.1f} ± {(timing['high_ms'] - timing['low_ms']) / 2:.1f}"
