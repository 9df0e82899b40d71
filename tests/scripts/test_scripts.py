"""The GitHub Action: its own steps, run here as a server would run them, and the job of GitLab that docs shows."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import regenerate_graphs, tables
from scripts.action import cut, errors_of
from tests.conftest import ROOT, exhaustive

ACTION: Any = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def bash(script: str, folder: Path, **values: str) -> tuple[int, str]:
    """The exit code of a script, and what it said; installing is left out."""
    lines = [line for line in script.splitlines() if not re.match(r"(python -m )?pip install", line)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = {"PATH": path, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    command = ["bash", "-eo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **here, **values},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def run(folder: Path, **given: str) -> dict[str, tuple[int, str]]:
    """The steps of the action with its inputs as ``given``: what each one said, and its exit code."""
    inputs = {
        name.replace("-", "_"): one.get("default", "") for name, one in ACTION["inputs"].items()
    } | given
    found: dict[str, tuple[int, str]] = {}
    for step in ACTION["runs"]["steps"]:
        asked = re.findall(r"inputs\.([\w-]+) != ''", step.get("if", ""))
        if "run" in step and step["name"] != "Install" and all(inputs[n.replace("-", "_")] for n in asked):
            filled = {
                name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: inputs[m[1].replace("-", "_")], value)
                for name, value in step.get("env", {}).items()
            }
            found[step["name"]] = bash(step["run"], folder, **filled, GITHUB_ACTION_PATH=str(ROOT))
    return found


def test_the_action_is_one() -> None:
    assert set(ACTION) == {"name", "description", "inputs", "runs"} and ACTION["runs"]["using"] == "composite"
    steps = ACTION["runs"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(step["shell"] == "bash" for step in steps if "run" in step)
    # What an input holds reaches a shell by its environment alone: in a script it would be code.
    assert not any("${{" in step.get("run", "") for step in steps)
    assert set(re.findall(r"inputs\.([\w-]+)", json.dumps(steps))) == set(ACTION["inputs"])


def test_the_action_stops_a_failed_check_and_a_change_that_regresses(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    text = f"--calibration '{stories_text}' --samples 32 --seq-len 128 --heldout-samples 8 --no-speed"
    model = str(stories_folder)
    steps = run(tmp_path, model=model, arguments=f"--k 2 {text} --max-ppl-ratio 1.000001", output="first")
    assert {name: code for name, (code, _) in steps.items()} == {"Linearize and verify": 1, "Show": 0}, steps
    assert "::error title=nbl-export: perplexity bound::perplexity × " in steps["Show"][1]
    assert "# nbl-export report: FAIL" in (tmp_path / "summary.md").read_text()

    (tmp_path / "summary.md").unlink()
    worse = {"arguments": f"--k 5 {text}", "output": "second"}
    steps = run(tmp_path, model=model, **worse, compare_with="first", bounds="--max-ppl-increase 1.01")
    codes = {name: code for name, (code, _) in steps.items()}
    assert codes == {"Linearize and verify": 0, "Compare": 1, "Show": 0}, steps
    assert (
        "::error title=nbl-export: perplexity increase::" in steps["Compare"][1]
        and "::error" not in steps["Show"][1]
    )
    compared, report = (tmp_path / "summary.md").read_text().split("# nbl-export report: PASS")
    assert "FAIL" in compared and report and "![" not in report


def test_words_of_the_inputs_are_no_code(tmp_path: Path) -> None:
    model = f"{tmp_path}/none$(touch harm)"
    steps = run(tmp_path, model=model, arguments="--k 1; touch harm", output="out`touch harm`")
    assert steps["Linearize and verify"][0] == 2 and "There is no report" in steps["Show"][1]
    assert not (tmp_path / "harm").exists()
    code, said = run(tmp_path, model="m", arguments="--calibration 'a")["Linearize and verify"]
    assert code == 2 and "::error title=nbl-export::arguments: No closing quotation" in said


def test_an_annotation_is_one_line_and_cannot_begin_another() -> None:
    checks = [
        {"name": "a,b:c", "status": "failed", "detail": "50 % lost\n::error::x"},
        {"name": "d", "status": "passed", "detail": ""},
    ]
    assert errors_of({"checks": checks}) == ["::error title=nbl-export: a%2Cb%3Ac::50 %25 lost%0A::error::x"]


def test_a_summary_that_is_too_long_ends_with_a_word_that_can_be_seen() -> None:
    rows = "| é | 1 |\n" * 100
    text = f"# Report\n\n<details>\n<summary>100 rows</summary>\n\n{rows}\n</details>\n\nlast\n"
    assert cut(text, len(text.encode())) == text
    short = cut(text, 600)
    assert len(short.encode()) <= 600 and short.count("<details>") == short.count("</details>") == 1
    assert short.index("</details>") < short.index("Cut here")


# clients table -------------------------------------------------------------------------------------


def test_every_test_that_it_names_is_there() -> None:
    for row in tables.CLIENTS:
        assert set(row["tests"]) <= set(tables.PRECISIONS) and set(row.get("refused", ())) <= set(
            row["tests"]
        )
        for test in row["tests"].values():
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.partition("[")[0] in functions, test


def test_the_page_is_of_these_rows() -> None:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    for row in tables.CLIENTS:
        assert f"| {row['engine']} | {row['reads']} | " in text, (
            "make it again: python scripts/tables.py clients"
        )
    assert tables.FAILS not in text.split("| engine |")[1]


# crash ---------------------------------------------------------------------------------------------


def test_the_short_run(shared_data: Path, tmp_path: Path) -> None:
    arguments = ["--kills", "12", "--seed", "1", "--only", "foreign", "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "crash.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "NBL_EXPORT_SHARED": str(shared_data.parent)},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"(\d+) kills, (\d+) failures, ", done.stdout)[-1] == ("12", "0"), done.stdout


# regenerate graphs ---------------------------------------------------------------------------------


USUAL = ("genai-int4-llama", "optimum-phi", "torch-phi3")
PAIRS = [
    pytest.param(pair, id="-".join(pair), marks=() if "-".join(pair) in USUAL else exhaustive)
    for pair in regenerate_graphs.PAIRS
]


@pytest.mark.parametrize("pair", PAIRS)
def test_reference_graphs_are_up_to_date(tmp_path: Path, pair: tuple[str, str]) -> None:
    written = regenerate_graphs.write_graphs(tmp_path, [pair])
    assert [p.name for p in written] == ["before.txt", "after.txt"]
    for path in written:
        name = path.relative_to(tmp_path)
        fresh, kept = path.read_text(), (ROOT / "graphs" / name).read_text()
        assert fresh == kept, f"{name} changed; if that is meant: python scripts/regenerate_graphs.py"


def test_no_other_graphs_are_kept() -> None:
    kept = {p.parent.name for p in (ROOT / "graphs").rglob("*.txt")}
    assert kept == {"-".join(pair) for pair in regenerate_graphs.PAIRS}
