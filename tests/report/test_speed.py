"""A race as a table: every figure under its heading, columns for what is known, and what the note has to say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbl_export.report.drawing import Table
from nbl_export.report.speed import (
    ENGINES,
    VERIFIED,
    ceiling_in_words,
    speed_table,
)
from nbl_export.verify.speed.values import (
    CandidateInfo,
    CellResult,
    Machine,
    Ratio,
    Result,
    Roofline,
    Speed,
    Timing,
)

OVER = Ratio(1.5, 1.4, 1.6, 1.35, 1.65, True)
ROOFLINE = Roofline("CPU", "float32", 2, 5e10, 2e10)
FULL = Result(
    "linearized",
    Timing(8.0, 7.5, 8.5, 9.25),
    21,
    1234.5,
    cache_bytes=3 << 19,
    peak_bytes=300 << 20,
    of_roofline=0.456,
    over_base=OVER,
    ceiling=1.25,
    linearized_over=None,
)
BASE = Result("base", Timing(12.0, 11.0, 13.0), 21, 800.0, linearized_over=replace(OVER, resolved=False))


def race(*cells: CellResult, **changes: Any) -> Speed:
    infos = (CandidateInfo("base"), CandidateInfo("linearized", "base"))
    return replace(Speed(Machine("CPU", 2, roofline=ROOFLINE), 7, infos, cells), **changes)


def shown(table: Table, name: str) -> dict[str, str]:
    """Heading to text, of the first row of that candidate."""
    row = next(row for row in table.rows if row[1] == name)
    return dict(zip(table.columns, row, strict=True))


CELL = CellResult("prefill", 1, 512, (BASE, FULL))


def test_every_figure_stands_under_its_heading() -> None:
    table = speed_table(VERIFIED, race(CELL))
    assert shown(table, "linearized") == {
        "": "prefill 512",
        "candidate": "linearized",
        "ms": "8.00 ± 0.50",
        "p99": "9.25",
        "tokens/s": "1,234",
        "over own base": "1.50×",
        "quartiles": "1.40–1.60",
        "ceiling": "1.25×",
        "of roofline": "46%",
        "cache MiB": "1.5",
        "peak MiB": "300",
        "rounds": "21",
    }
    base = shown(table, "base")
    assert base["ms"] == "12.0 ± 1.0"
    assert [base[name] for name in ("p99", "over own base", "ceiling", "cache MiB")] == [""] * 4


def test_over_the_base_alone_the_linearized_one_has_its_speedup_once() -> None:
    """It stands beside it; over others it is a figure of its own."""
    assert "linearized over it" not in speed_table(VERIFIED, race(CELL)).columns
    other = replace(BASE, name="eager")
    table = speed_table(VERIFIED, race(replace(CELL, results=(BASE, FULL, other))))
    assert shown(table, "base")["linearized over it"] == "1.50× not resolved"
    assert shown(table, "eager")["linearized over it"] == "1.50× not resolved"


def test_the_note_says_what_was_done() -> None:
    absent = {"eager": "out of memory"}
    cells = [replace(CELL, phase="decode", context=n, absent=absent) for n in (8, 16)]
    note = speed_table(VERIFIED, race(CELL, *cells)).note
    assert note.startswith("CPU, 2 threads: interleaved in one process, 7 rounds, and more if needed;")
    assert (
        note.index("Prefill from an empty cache") < note.index("Decode: one token") and "Encode" not in note
    )
    # 5e10 multiply-adds are 1e11 operations.
    assert "a machine that does 100 GFLOP/s and reads 20.0 GB/s, measured in the same run" in note
    assert note.endswith("Not timed: eager in decode 8, decode 16 (out of memory).")
    assert "allow on any machine" in speed_table(VERIFIED, race(CELL, machine=Machine("CPU"))).note
    assert "threads" not in speed_table(ENGINES, race(CELL, machine=Machine("A GPU"))).note.split(":")[0]


def test_a_speedup_above_its_ceiling_is_said() -> None:
    table = speed_table(VERIFIED, race(CELL))
    assert "It does not count transposes" in table.note and shown(table, "linearized")["ceiling"] == "1.25×"
    above = "above its ceiling of 1.25×, which counts multiplications and bytes only"
    assert ceiling_in_words(FULL) == above
    noisy = replace(FULL, over_base=replace(OVER, least=1.2))
    assert ceiling_in_words(noisy) == "ceiling 1.25×, exceeded within the noise"
    assert ceiling_in_words(replace(FULL, ceiling=1.5)) == "ceiling 1.50×"
    assert ceiling_in_words(replace(FULL, ceiling=None)) == ""
