"""What the action says of a report: annotations that are one line, and a job summary that can be shown."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from scripts.annotate import cut, errors_of, summary

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(stories_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_out, tmp_path / "out", copy_function=shutil.copy2))


def test_a_summary_is_the_report_without_its_pictures(out: Path) -> None:
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    shown = summary(out / "report")
    assert "](plots/" in text and "](plots/" not in shown and "![" not in shown
    kept = [line for line in text.splitlines() if line and not line.startswith("![")]
    assert [line for line in shown.splitlines() if line] == kept
    # Who appends it by hand does as docs/ci.md says.
    (line,) = re.findall(r"grep -v '(.*)' out/model/report/report.md", (ROOT / "docs" / "ci.md").read_text())
    assert [one for one in text.splitlines() if one and not re.match(line, one)] == kept


def test_a_summary_that_is_too_long_ends_with_a_word_that_can_be_seen() -> None:
    rows = "| é | 1 |\n" * 100
    text = f"# Report\n\n<details>\n<summary>100 rows</summary>\n\n{rows}\n</details>\n\nlast\n"
    assert cut(text, len(text.encode())) == text
    short = cut(text, 600)
    assert len(short.encode()) <= 600 and short.count("<details>") == short.count("</details>") == 1
    assert short.index("</details>") < short.index("Cut here")
    assert all(line == "| é | 1 |" for line in short.splitlines() if line.startswith("|"))


def test_an_annotation_is_one_line_and_cannot_begin_another() -> None:
    checks = [
        {"name": "a,b:c", "status": "failed", "detail": "50 % lost\n::error::x"},
        {"name": "d", "status": "passed", "detail": ""},
    ]
    assert errors_of({"checks": checks}) == ["::error title=nbl-export: a%2Cb%3Ac::50 %25 lost%0A::error::x"]
