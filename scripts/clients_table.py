"""Write docs/clients.md: which engine runs which of our forms in which precision, from the tests that run it.

    python scripts/clients_table.py [--from JUNIT.xml]

Without ``--from`` the tests are run first, in ten minutes on two cores, with what scripts/test.sh installs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from junitparser import JUnitXml, Skipped, TestCase

from nbl_export.files import read_table

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "clients.md"
PRECISIONS = ("fp32", "fp16", "bf16", "8 bits", "4 bits")
WORKS, REFUSED, FAILS, NOT_TRIED = "works", "refused", "**fails**", "–"
HEAD = """# Who runs what

Made by `scripts/clients_table.py` from the tests in `scripts/clients_table.toml`: each runs the engine itself with a
small linearized model, and holds what it computes to PyTorch, or to our own decode loop, token for token.

*works* · *refused*, before anything is written · **fails** · a number: not run here, for the reason below ·
{not_tried}: no such form, or not tried.

"""


@dataclass(frozen=True)
class Row:
    """An ``engine``, what it reads, and for each precision the test that runs it; ``refused`` tests see a refusal."""

    engine: str
    reads: str
    tests: Mapping[str, str]
    refused: frozenset[str] = frozenset()


def rows() -> list[Row]:
    """Those of clients_table.toml."""
    told = read_table(Path(__file__).with_suffix(".toml"))
    return [Row(**{**row, "refused": frozenset(row.get("refused", ()))}) for row in told["row"]]


ROWS = rows()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="results", type=Path, metavar="JUNIT.xml")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = asked.results or run(Path(folder) / "junit.xml")
        text = page(cases_in(results))
    TARGET.write_text(text, encoding="utf-8")
    print(text)


def run(results: Path) -> Path:
    """Run the tests that the table names; returns the file of their results."""
    named = sorted({test for row in ROWS for test in row.tests.values()})
    command = [sys.executable, "-m", "pytest", "-q", *named, f"--junitxml={results}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NBL_EXPORT_ALL_TESTS": "1"}, check=False)
    if done.returncode not in (0, 1):  # tests that passed, and failed
        sys.exit("A test of the table is not there: the page stays as it was.")
    return results


def cases_in(results: Path) -> dict[str, TestCase]:
    """Each test case by the name that pytest gives it."""
    found = {}
    for suite in JUnitXml.fromfile(str(results)):
        for case in suite:
            found[f"{(case.classname or '').replace('.', '/')}.py::{case.name}"] = case
    return found


def page(cases: Mapping[str, TestCase]) -> str:
    """The page, with a number for each reason why something was not run."""
    reasons: dict[str, int] = {}
    lines = ["| engine | reads | " + " | ".join(PRECISIONS) + " |", "|---" * (len(PRECISIONS) + 2) + "|"]
    for row in ROWS:
        cells = (cell(row, precision, cases, reasons) for precision in PRECISIONS)
        lines.append(f"| {row.engine} | {row.reads} | " + " | ".join(cells) + " |")
    numbered = [f"{number}. {reason}" for reason, number in reasons.items()]
    return (
        HEAD.format(not_tried=NOT_TRIED)
        + "\n".join(lines)
        + "\n"
        + "".join(f"\n{one}" for one in numbered)
        + "\n"
    )


def cell(row: Row, precision: str, cases: Mapping[str, TestCase], reasons: dict[str, int]) -> str:
    """What became of the test of a row in a precision."""
    if precision not in row.tests:
        return NOT_TRIED
    case = cases.get(row.tests[precision])
    if case is None:
        return FAILS
    skipped = [result.message for result in case.result if isinstance(result, Skipped)]
    if skipped:
        reason = str(skipped[0]).rstrip(".")
        return str(reasons.setdefault(f"{reason[:1].upper()}{reason[1:]}.", len(reasons) + 1))
    if case.result:
        return FAILS
    return REFUSED if precision in row.refused else WORKS


if __name__ == "__main__":
    main()
