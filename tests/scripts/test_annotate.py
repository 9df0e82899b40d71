"""The GitHub Action: its own steps, run as a runner runs them, on a real model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.annotate import cut, errors_of, summary

ROOT = Path(__file__).parents[2]
ACTION: Any = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def test_the_action_is_one() -> None:
    assert set(ACTION) == {"name", "description", "inputs", "runs"} and ACTION["runs"]["using"] == "composite"
    steps = ACTION["runs"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(step["shell"] == "bash" for step in steps if "run" in step)
    # What an input holds reaches a shell by its environment alone: in a script it would be code.
    assert not any("${{" in step.get("run", "") for step in steps)
    named = set(re.findall(r"inputs\.([\w-]+)", json.dumps(steps)))
    assert named == set(ACTION["inputs"])


class Runner:
    """Runs the steps of the action with its inputs; those of other actions, and the installation, are left out."""

    def __init__(self, folder: Path, **inputs: str) -> None:
        self.folder = folder
        self.summary = folder / "summary.md"
        self._inputs = {name: one.get("default", "") for name, one in ACTION["inputs"].items()} | {
            name.replace("_", "-"): value for name, value in inputs.items()
        }

    def run(self) -> tuple[dict[str, int], str]:
        """The exit code of each step by its name, and what all of them said."""
        codes: dict[str, int] = {}
        said = ""
        for step in ACTION["runs"]["steps"]:
            if "run" not in step or step["name"] == "Install" or not self._wanted(step.get("if", ""), codes):
                continue
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", step["run"]],
                cwd=self.folder,
                env=self._environment(step.get("env", {})),
                capture_output=True,
                text=True,
            )
            codes[step["name"]] = done.returncode
            said += done.stdout + done.stderr
        return codes, said

    def _wanted(self, condition: str, codes: Mapping[str, int]) -> bool:
        always = "always()" in condition
        asked = all(self._inputs[name] != "" for name in re.findall(r"inputs\.([\w-]+) != ''", condition))
        return asked and (always or not any(codes.values()))

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        values = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: self._inputs[found[1]], value)
            for name, value in given.items()
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {
            **os.environ,
            **values,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }


@pytest.fixture
def out(stories_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_out, tmp_path / "out", copy_function=shutil.copy2))


QUICK = "--no-quality --no-speed --decode-steps 2"


def test_a_run_that_passes_and_a_change_that_regresses(
    out: Path, stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    text = f"--calibration '{stories_text}' --samples 32 --seq-len 128 --heldout-samples 8"
    passing = Runner(
        tmp_path, model=str(stories_folder), arguments=f"--k 2 {text} --no-speed", output="first"
    )
    codes, said = passing.run()
    assert codes == {"Linearize and verify": 0, "Show": 0}, said
    assert (
        "# nbl-export report: PASS" in passing.summary.read_text() and "![" not in passing.summary.read_text()
    )
    assert "::error" not in said

    worse = Runner(
        tmp_path,
        model=str(stories_folder),
        arguments=f"--k 5 {text} --no-speed --max-ppl-ratio 1.01",
        output="second",
        compare_with="first",
        bounds="--max-ppl-increase 1.01",
    )
    worse.summary.unlink()
    codes, said = worse.run()
    assert codes == {"Linearize and verify": 1, "Compare": 1, "Show": 0}, said
    assert "::error title=nbl-export: perplexity bound::perplexity × " in said
    shown = worse.summary.read_text()
    assert "# nbl-export report: FAIL" in shown and "FAIL" in shown.split("# nbl-export report")[0]


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


def test_words_of_the_inputs_are_no_code(stories_folder: Path, tmp_path: Path) -> None:
    hostile = Runner(
        tmp_path,
        model=f"{stories_folder}/none$(touch harm)",
        arguments="--k 1; touch harm",
        output="out`touch harm`",
    )
    codes, said = hostile.run()
    assert codes["Linearize and verify"] == 2 and not (tmp_path / "harm").exists(), said
    assert "There is no report" in said


def test_an_annotation_is_one_line_and_cannot_begin_another() -> None:
    checks = [
        {"name": "a,b:c", "status": "failed", "detail": "50 % lost\n::error::x"},
        {"name": "d", "status": "passed", "detail": ""},
    ]
    assert errors_of({"checks": checks}) == ["::error title=nbl-export: a%2Cb%3Ac::50 %25 lost%0A::error::x"]
