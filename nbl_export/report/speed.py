"""Draw what a race says as one table for all: `verify`, engines on a GPU, and `bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbl_export.report.drawing import Table, decimals, finite, milliseconds, number
from nbl_export.verify.speed.values import DECODE, ENCODE, PREFILL, Ratio, Result, Roofline, Speed, Timing

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


def speed_table(race: str, speed: Speed, brief: bool = False) -> Table:
    """Of the ``race`` :data:`VERIFIED`, :data:`ENGINES` or :data:`BENCH`: a row for each candidate in each cell.

    ``brief`` keeps what 80 columns hold; a column that nobody has a figure for is left out.
    """
    every = [(cell, i, result) for cell in speed.cells for i, result in enumerate(cell.results)]
    # Over the base alone that is the linearized one's own speedup, which stands beside it.
    others = any(r.linearized_over for _, _, r in every if r.name != speed.base)
    noise = " ~" if brief else " not resolved"
    columns: Sequence[tuple[str, Callable[[Result], str], bool]] = (
        ("ms", lambda r: spread(r.timing), True),
        ("p99", lambda r: "" if r.timing.p99_ms is None else milliseconds(r.timing.p99_ms), True),
        ("tokens/s", lambda r: f"{r.tokens_per_second:,.0f}", True),
        ("over own base", lambda r: _ratio(r.over_base, noise), True),
        ("quartiles", lambda r: _quartiles(r.over_base), False),
        ("ceiling", lambda r: "" if r.ceiling is None else f"{number(r.ceiling, '.2f')}×", True),
        ("of roofline", lambda r: f"{r.of_roofline:.0%}" if r.of_roofline else "", False),
        ("linearized over it", lambda r: _ratio(r.linearized_over, noise) if others else "", False),
        ("cache MiB", lambda r: f"{r.cache_bytes / 2**20:,.1f}" if r.cache_bytes else "", False),
        ("peak MiB", lambda r: f"{r.peak_bytes / 2**20:,.0f}" if r.peak_bytes else "", False),
        ("rounds", lambda r: str(r.rounds), False),
    )
    shown = [
        (heading, text)
        for heading, text, always in columns
        if (always or not brief) and any(text(result) for _, _, result in every)
    ]
    rows = tuple(
        # Where there is little room, a cell is named once.
        ("" if brief and i else cell.name, result.name, *(text(result) for _, text in shown))
        for cell, i, result in every
    )
    title = _TITLES[race].format(device=speed.machine.device)
    headings = ("", "candidate", *(heading for heading, _ in shown))
    return Table(title, headings, rows, _note(speed, [r for _, _, r in every], brief), plot=race)


def _note(speed: Speed, results: list[Result], brief: bool) -> str:
    machine = speed.machine
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
    if any(r.ceiling for r in results):
        said.append(
            "Ceiling: what the multiplications of both graphs, and the bytes that they read, allow on "
            f"{_roofline_in_words(machine.roofline)}. It does not count transposes, masks, softmax and copies of the "
            "cache, which are gone too: a speedup can be above it."
        )
    if not brief and any((r.of_roofline or 0) > 1 for r in results):
        said.append("Of roofline: over 100 % where what is read lies in the processor's caches.")
    if speed.has_percentiles:
        said.append("p99: of single passes and steps.")
    if not brief:
        said.append("Cache: filled, with an engine's work space, without weights.")
    said += [
        f"Not timed: {name} in {', '.join(cell.name for cell in cells)} ({why})."
        for (name, why), cells in speed.absent().items()
    ]
    return " ".join(said)


def ceiling_in_words(result: Result) -> str:
    """The ceiling of a speedup and, if that is above it, why; empty if there is none."""
    over, limit = result.over_base, result.ceiling
    if limit is None or over is None:
        return ""
    shown = f"{number(limit, '.2f')}×"
    if not over.value > limit:
        return f"ceiling {shown}"
    if over.least > limit:
        return f"above its ceiling of {shown}, which counts multiplications and bytes only"
    return f"ceiling {shown}, exceeded within the noise"


def _roofline_in_words(roofline: Roofline | None) -> str:
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
    return shown if half is None else f"{shown} ± {half:.{decimals(timing.median_ms)}f}"


def _ratio(found: Ratio | None, noise: str) -> str:
    return "" if found is None else f"{number(found.value, '.2f')}×" + ("" if found.resolved else noise)


def _quartiles(found: Ratio | None) -> str:
    return "" if found is None or finite(found.low) is None else f"{found.low:.2f}–{found.high:.2f}"
