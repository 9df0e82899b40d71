"""Write docs/families.md and docs/clients.md: what works, of the results of the tests that try it.

    python scripts/tables.py families [--from JUNIT.xml ...]
    python scripts/tables.py clients  [--from JUNIT.xml ...]

Without ``--from`` the tests are run first, on two cores in 20 minutes and in ten, with what scripts/test.sh installs;
NBL_EXPORT_OPTIMUM_PYTHON must name a Python with optimum for its column. Later files override earlier ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from junitparser import JUnitXml, Properties, Skipped, TestCase

from nbl_export.files import read_table

ROOT = Path(__file__).parent.parent
WORKS, REFUSED, FAILS, NOT_TRIED = "works", "refused", "**fails**", "–"
Cases = Mapping[str, TestCase]

FAMILIES = "tests/test_families.py"
_FORMS = (
    "concat-fp32",
    "static-fp32",
    "shared-fp32",
    *(f"{c}-{p}" for p in ("fp16", "bf16") for c in ("concat", "static")),
)
# Column → the test and its parameters after the family.
COLUMNS = {
    **{" ".join(reversed(form.split("-"))): ("test_graph", form) for form in _FORMS},
    "int4 concat": ("test_integers", "int4"),
    **{f"engine {cache}": ("test_engine", cache) for cache in ("concat", "static")},
    **{e.replace("-", " "): ("test_other_exporter", e) for e in ("genai-fp32", "genai-int4", "optimum")},
}
OF_FAMILIES = """# Families

Made by `scripts/tables.py families` from the results of `{tests}`, with transformers {transformers}, torch {torch},
onnxruntime {onnxruntime}, tensorrt-rtx {tensorrt_rtx} and Python {python}. Each row is a tiny random model with the
features of its family active (windows shorter than the text, rope scaling, soft-capping …) and weights scaled so that
attention matters; in each cell the attention of two layers and the MLPs of two (where the family's may become linear)
are linear, and the graph's outputs equal PyTorch's with the same W and b, over a ragged prefill and decode steps,
within the gates of its precision; in int4, no further from PyTorch than three times what the unmodified graph is.

*crosses* are the lengths at which the family begins to compute something else: each is shorter than a prompt, and
decoded across, in every cell.

*works* · a number: refused with the sentence below · **fails**: rewritten, and beyond a gate, as is the graph of that
exporter before it · {not_tried}: not tried.
An engine is the float16 graph, built ahead of time by TensorRT for RTX and not run here; *decomposed* means that its
attention is not one fused kernel, because it is decomposed in the graph (soft-capping, a family's own code). Models of
other families are found by their structure: try yours; what is not supported is refused before calibration.

"""

PRECISIONS = ("fp32", "fp16", "bf16", "8 bits", "4 bits")
# An engine, what it reads, and for each precision the test that runs it; ``refused`` tests see a refusal.
CLIENTS: Sequence[Mapping[str, Any]] = read_table(Path(__file__).with_name("clients.toml"))["row"]
OF_CLIENTS = """# Who runs what

Made by `scripts/tables.py clients` from the tests in `scripts/clients.toml`: each runs the engine itself with a small
linearized model, and holds what it computes to PyTorch, or to our own decode loop, token for token.

*works* · *refused*, before anything is written · **fails** · a number: not run here, for the reason below ·
{not_tried}: no such form, or not tried.

"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("families", "clients"))
    parser.add_argument("--from", dest="results", type=Path, nargs="+", metavar="JUNIT.xml")
    asked = parser.parse_args()
    named = sorted({test for row in CLIENTS for test in row["tests"].values()})
    with tempfile.TemporaryDirectory() as folder:
        tests = ["-n", "auto", FAMILIES] if asked.table == "families" else named
        cases = cases_in(asked.results or [run(tests, Path(folder) / "junit.xml")])
    page = families(cases) if asked.table == "families" else clients(cases)
    (ROOT / "docs" / f"{asked.table}.md").write_text(page, encoding="utf-8")
    print(page)


def run(tests: Sequence[str], results: Path) -> Path:
    """Run the tests; returns the file of their results, which are read even if some fail."""
    # The properties that tests record need xunit1.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *tests,
        f"--junitxml={results}",
        "-o",
        "junit_family=xunit1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NBL_EXPORT_ALL_TESTS": "1"}, check=False)
    if done.returncode not in (0, 1):  # tests that passed, and failed
        sys.exit("A test of the table is not there: the page stays as it was.")
    return results


def cases_in(paths: Sequence[Path]) -> Cases:
    """Each test case by the name that pytest gives it."""
    suites = [suite for path in paths for suite in JUnitXml.fromfile(str(path))]
    return {
        f"{(case.classname or '').replace('.', '/')}.py::{case.name}": case
        for suite in suites
        for case in suite
    }


def families(cases: Cases) -> str:
    """The page; families are in the order in which they were tried."""
    found = (
        re.fullmatch(rf"{FAMILIES}::{test}\[(.+)-{of}\]", name)
        for name in cases
        for test, of in COLUMNS.values()
    )
    reasons: dict[str, int] = {}
    rows = []
    for family in dict.fromkeys(match[1] for match in found if match):
        own = [cases.get(f"{FAMILIES}::{test}[{family}-{of}]") for test, of in COLUMNS.values()]
        crosses = next(filter(None, (recorded(case).get("crosses") for case in own)), "")
        rows.append([family, crosses, *(of_family(case, reasons) for case in own)])
    packages = ("transformers", "torch", "onnxruntime", "tensorrt-rtx")
    versions = {name.replace("-", "_"): version(name).split("+")[0] for name in packages}
    head = OF_FAMILIES.format(
        tests=FAMILIES, not_tried=NOT_TRIED, python=platform.python_version(), **versions
    )
    return head + table(["", "crosses", *COLUMNS], rows, reasons)


def of_family(case: TestCase | None, reasons: dict[str, int]) -> str:
    if case is None or skipped(case):
        return NOT_TRIED
    if case.result:
        return FAILS
    if reason := recorded(case).get("refused"):
        return str(reasons.setdefault(reason, len(reasons) + 1))
    return "decomposed" if recorded(case).get("fused") == "False" else WORKS


def clients(cases: Cases) -> str:
    """The page of the rows of clients.toml."""
    reasons: dict[str, int] = {}
    rows = [
        [
            row["engine"],
            row["reads"],
            *(of_client(row, precision, cases, reasons) for precision in PRECISIONS),
        ]
        for row in CLIENTS
    ]
    head = OF_CLIENTS.format(not_tried=NOT_TRIED)
    return head + table(["engine", "reads", *PRECISIONS], rows, reasons)


def of_client(row: Mapping[str, Any], precision: str, cases: Cases, reasons: dict[str, int]) -> str:
    if precision not in row["tests"]:
        return NOT_TRIED
    case = cases.get(row["tests"][precision])
    if case is not None and (reason := skipped(case).rstrip(".")):
        return str(reasons.setdefault(f"{reason[:1].upper()}{reason[1:]}.", len(reasons) + 1))
    if case is None or case.result:
        return FAILS
    return REFUSED if precision in row.get("refused", ()) else WORKS


def skipped(case: TestCase) -> str:
    """Why a test was skipped; nothing if it was run."""
    return next((str(result.message) for result in case.result if isinstance(result, Skipped)), "")


def recorded(case: TestCase | None) -> dict[str, str]:
    """The properties that a test has recorded."""
    return {} if case is None else {p.name: p.value for p in case.child(Properties) or ()}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], reasons: Mapping[str, int]) -> str:
    """The table as Markdown, and below it the numbered reasons."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    numbered = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *numbered, ""])


if __name__ == "__main__":
    main()
