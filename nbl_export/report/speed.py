"""What a race says, in one table for all: `verify`, engines on a GPU, and `bench`.

A row for each candidate in each cell; then what the ceilings count, and which speedups are above them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbl_export.report.drawing import Table, finite, number
from nbl_export.verify.speed.values import (
    DECODE,
    ENCODE,
    PREFILL,
    Ratio,
    Result,
    Roofline,
    Speed,
    Timing,
)

# The three races of a report, by the names of their plots.
VERIFIED, ENGINES, BENCH = "speed", "engines", "bench"
_TITLES = {
    VERIFIED: "Speed on ONNX Runtime, batch 1",
    ENGINES: "Speed on {device}, batch 1",
    BENCH: "Bench",
}
_MEANING = {
    PREFILL: "Prefill from an empty cache: the time to the first token.",
    DECODE: "Decode: one token per row after that many, with a filled cache.",
    ENCODE: "Encode: one pass over that many tokens.",
}


def speed_tables(race: str, speed: Speed, brief: bool = False) -> list[Table]:
    """Of the ``race`` :data:`VERIFIED`, :data:`ENGINES` or :data:`BENCH`; ``brief`` keeps what 80 columns hold."""
    title = _TITLES[race].format(device=speed.machine.device)
    return [_table(speed, title, race, brief)]


@dataclass(frozen=True)
class _Column:
    """A heading and what stands below it; not ``brief``: left out where there is little room."""

    heading: str
    text: Callable[[Result], str]
    brief: bool = False


def _columns(speed: Speed, brief: bool) -> tuple[_Column, ...]:
    # Over the base alone that is the linearized one's own speedup, which stands beside it.
    others = any(r.linearized_over for cell in speed.cells for r in cell.results if r.name != speed.base)
    noise = " ~" if brief else " not resolved"
    return (
        _Column("ms", lambda r: spread(r.timing), True),
        _Column("p99", lambda r: "" if r.timing.p99_ms is None else milliseconds(r.timing.p99_ms), True),
        _Column("tokens/s", lambda r: f"{r.tokens_per_second:,.0f}", True),
        _Column("over own base", lambda r: _ratio(r.over_base, noise), True),
        _Column("quartiles", lambda r: _quartiles(r.over_base)),
        _Column("ceiling", lambda r: _times(r.ceiling), True),
        _Column(
            "÷ ceiling",
            lambda r: number(r.over_base.value / r.ceiling, ".2f") if r.over_base and r.ceiling else "",
        ),
        _Column("of roofline", lambda r: f"{r.of_roofline:.0%}" if r.of_roofline else ""),
        _Column("linearized over it", lambda r: _ratio(r.linearized_over, noise) if others else ""),
        _Column("cache MiB", lambda r: f"{r.cache_bytes / 2**20:,.1f}" if r.cache_bytes else ""),
        _Column("peak MiB", lambda r: f"{r.peak_bytes / 2**20:,.0f}" if r.peak_bytes else ""),
        _Column("rounds", lambda r: str(r.rounds)),
    )


def _table(speed: Speed, title: str, plot: str, brief: bool) -> Table:
    every = [(cell, i, result) for cell in speed.cells for i, result in enumerate(cell.results)]
    columns = [
        column
        for column in _columns(speed, brief)
        # One that nobody has a figure for is left out.
        if (column.brief or not brief) and any(column.text(result) for _, _, result in every)
    ]
    rows = tuple(
        # Where there is little room, a cell is named once.
        ("" if brief and i else cell.name, result.name, *(column.text(result) for column in columns))
        for cell, i, result in every
    )
    return Table(
        title, ("", "candidate", *(c.heading for c in columns)), rows, _note(speed, brief), plot=plot
    )


def _note(speed: Speed, brief: bool) -> str:
    results = [r for cell in speed.cells for r in cell.results]
    machine, ceilings = speed.machine, any(r.ceiling for r in results)
    threads = f", {machine.threads} threads" if machine.threads else ""
    said = [
        f"{machine.device}{threads}: interleaved in one process, {speed.rounds} rounds, and more if needed; medians "
        "± half the interquartile range.",
        *(_MEANING[phase] for phase in speed.phases),
    ]
    if any(r.over_base for r in results):
        mark = "~: not resolved" if brief else "Not resolved"
        said.append(
            f"{mark}, the noise exceeds the effect, by a 95 % interval of the median of at least six rounds."
        )
    if ceilings:
        said.append(
            "Ceiling: what the multiplications of both graphs, and the bytes that they read, allow on "
            f"{_roofline_in_words(machine.roofline)}."
        )
        said += _above_in_words(speed)
    if not brief and any((r.of_roofline or 0) > 1 for r in results):
        said.append("Of roofline: over 100 % where what is read lies in the processor's caches.")
    if speed.has_percentiles:
        said.append("p99: of single passes and steps.")
    if not brief:
        said.append("Cache: filled, with an engine's work space, without weights.")
        if any(r.peak_bytes for r in results):
            said.append("Peak: of a separate process.")
    said += [
        f"Not timed: {name} in {', '.join(cell.name for cell in cells)} ({why})."
        for (name, why), cells in speed.absent().items()
    ]
    return " ".join(said)


_NAMED = 6  # cells; more are counted


def ceiling_in_words(result: Result) -> str:
    """The ceiling of a speedup, and whether that is above it; empty if there is none."""
    if result.ceiling is None:
        return ""
    words = {
        False: "ceiling {}",
        True: "above its ceiling of {}, which counts multiplications and bytes only",
        None: "ceiling {}, exceeded within the noise",
    }
    return words[result.above_ceiling].format(_times(result.ceiling))


def _above_in_words(speed: Speed) -> list[str]:
    """What a ceiling does not count, and which speedups are above theirs; nothing where none is."""
    above = [(cell, r) for cell in speed.cells for r in cell.results if r.above_ceiling is not False]
    several = any(r.name != speed.linearized for _, r in above)
    groups = []
    for certain, doubt in ((True, ""), (None, " (not certain: the 95 % interval reaches down to it)")):
        named = [
            f"{cell.name} {r.name}" if several else cell.name
            for cell, r in above
            if r.above_ceiling is certain
        ]
        if named:
            groups.append((", ".join(named) if len(named) <= _NAMED else f"{len(named)} speedups") + doubt)
    if not groups:
        return []
    return [
        "A speedup can be above it: the ceiling counts multiplications and bytes, at the machine's best, and nothing "
        "else. Attention computes slower than that, and its transposes, masks, softmax and copies of the cache are "
        "gone with it.",
        f"Above it: {'; '.join(groups)}.",
    ]


def _roofline_in_words(roofline: Roofline | None) -> str:
    """The measured machine; a report of an earlier version has none."""
    if roofline is None:
        return "any machine"
    return (
        f"a machine that does {2e-9 * roofline.macs_per_second:,.0f} GFLOP/s and reads "
        f"{1e-9 * roofline.bytes_per_second:,.1f} GB/s, measured in the same run"
    )


def spread(timing: Timing) -> str:
    """The median and half the interquartile range, in milliseconds; the median alone where quartiles are not known."""
    half = finite((timing.high_ms - timing.low_ms) / 2)
    shown = milliseconds(timing.median_ms)
    return shown if half is None else f"{shown} ± {half:.{_decimals(timing.median_ms)}f}"


def milliseconds(value: float) -> str:
    """With the more decimals the shorter."""
    return number(value, f".{_decimals(value)}f")


def _decimals(value: float) -> int:
    return 1 if value >= 10 else 2 if value >= 1 else 3


def _ratio(found: Ratio | None, noise: str) -> str:
    return "" if found is None else _times(found.value) + ("" if found.resolved else noise)


def _quartiles(found: Ratio | None) -> str:
    if found is None or finite(found.low) is None:
        return ""
    return f"{found.low:.2f}–{found.high:.2f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{number(value, '.2f')}×"
