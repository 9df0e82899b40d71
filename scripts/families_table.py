"""Write docs/families.md: which family works in which form, from the results of tests/test_families.py.

    python scripts/families_table.py [--from JUNIT.xml ...]

Without ``--from`` the tests are run first, with the exporters of other projects (about 20 minutes on two cores;
NBL_EXPORT_OPTIMUM_PYTHON must name a Python with optimum for its column). Later files override earlier ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from junitparser import Failure, JUnitXml, Properties, Skipped, TestCase

ROOT = Path(__file__).parent.parent
TESTS, TARGET = "tests/test_families.py", ROOT / "docs" / "families.md"
_CACHES = {
    "fp32": ("concat", "static", "shared"),
    "fp16": ("concat", "static"),
    "bf16": ("concat", "static"),
}
# Column → the test and its parameters after the family.
_GRAPHS = {f"{p} {c}": ("test_graph", f"{c}-{p}") for p, caches in _CACHES.items() for c in caches}
_ENGINES = {f"engine {c}": ("test_engine", c) for c in ("concat", "static")}
_OTHERS = {e.replace("-", " "): ("test_other_exporter", e) for e in ("genai-fp32", "genai-int4", "optimum")}
COLUMNS = {**_GRAPHS, **_ENGINES, **_OTHERS}
CROSSES = "crosses"
WORKS, FAILS, NOT_TRIED = "works", "**fails**", "–"
HEAD = """# Families

Made by `scripts/families_table.py` from the results of `{tests}`, with transformers {transformers}, torch {torch},
onnxruntime {onnxruntime}, tensorrt-rtx {tensorrt_rtx} and Python {Python}. Each row is a tiny random model with the
features of its family active (windows shorter than the text, rope scaling, soft-capping …) and weights scaled so that
attention matters; in each cell the attention of two layers and the MLPs of two (where the family's may become linear)
are linear, and the graph's outputs equal PyTorch's with the same W and b, over a ragged prefill and decode steps,
within the gates of its precision.

*crosses* are the lengths at which the family begins to compute something else: each is shorter than a prompt, and
decoded across, in every cell.

*works* · a number: refused with the sentence below · **fails**: rewritten, and beyond a gate, as is the graph of that
exporter before it · {not_tried}: not tried.
An engine is the float16 graph, built ahead of time by TensorRT for RTX and not run here; *decomposed* means that its
attention is not one fused kernel, because it is decomposed in the graph (soft-capping, a family's own code). Models of
other families are found by their structure: try yours; what is not supported is refused before calibration.

"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="results", type=Path, nargs="+", help="JUnit files of runs of the tests"
    )
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        cases = read(results or [run(Path(folder) / "junit.xml")])
    TARGET.write_text(table(cases), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(cases)} families")


def run(path: Path) -> Path:
    """Run the tests; their results are read even if they fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", TESTS, f"--junitxml={path}"]
    command += ["-o", "junit_family=xunit1"]  # needed for the properties that the tests record
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NBL_EXPORT_ALL_TESTS": "1"}, check=False)
    return path


def read(paths: Sequence[Path]) -> Mapping[str, Mapping[tuple[str, str], TestCase]]:
    """The test cases by family, and by test and its other parameters."""
    found: dict[str, dict[tuple[str, str], TestCase]] = defaultdict(dict)
    tests = {test for test, _ in COLUMNS.values()}
    for suite in (suite for path in paths for suite in JUnitXml.fromfile(str(path))):
        for case in suite:
            if (match := re.fullmatch(r"(\w+)\[(.+)\]", case.name or "")) and match[1] in tests:
                parameters = next(
                    p for t, p in COLUMNS.values() if t == match[1] and match[2].endswith(f"-{p}")
                )
                found[match[2].removesuffix(f"-{parameters}")][match[1], parameters] = case
    return found


def versions() -> dict[str, str]:
    """What the results depend on."""
    return {
        "transformers": version("transformers"),
        "torch": version("torch").split("+")[0],
        "onnxruntime": version("onnxruntime"),
        "tensorrt-rtx": version("tensorrt-rtx"),
        "Python": platform.python_version(),
    }


def table(cases: Mapping[str, Mapping[tuple[str, str], TestCase]]) -> str:
    reasons: dict[str, int] = {}
    lines = ["| | " + " | ".join((CROSSES, *COLUMNS)) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for family, results in cases.items():
        cells = [
            crossed(results.values()),
            *(cell(results.get(key), reasons) for key in COLUMNS.values()),
        ]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    head = HEAD.format(
        tests=TESTS,
        not_tried=NOT_TRIED,
        **{name.replace("-", "_"): one for name, one in versions().items()},
    )
    refusals = [f"{number}. {reason}" for reason, number in reasons.items()]
    return head + "\n".join(lines) + "\n\n" + "\n".join(refusals) + "\n"


def crossed(cases: Iterable[TestCase]) -> str:
    """The lengths that a family's texts crossed, as its tests have recorded them."""
    found = [p.value for case in cases for p in case.child(Properties) or () if p.name == "crosses"]
    return next(iter(filter(None, found)), "")


def cell(case: TestCase | None, reasons: dict[str, int]) -> str:
    """The result of a test; the message of a refusal becomes a number in ``reasons``."""
    if case is None or any(isinstance(r, Skipped) for r in case.result):
        return NOT_TRIED
    if any(isinstance(r, Failure) or not isinstance(r, Skipped) for r in case.result):
        return FAILS
    recorded = {p.name: p.value for p in case.child(Properties) or ()}
    if reason := recorded.get("refused"):
        return str(reasons.setdefault(reason, len(reasons) + 1))
    return "decomposed" if recorded.get("fused") == "False" else WORKS


if __name__ == "__main__":
    main()
