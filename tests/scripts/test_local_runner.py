"""Pipelines run here as a server would run them: the action's own steps, and the job of GitLab that docs shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.local_runner import ROOT, Runner, Step

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


def test_the_action_passes_and_stops_a_change_that_regresses(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    text = f"--calibration '{stories_text}' --samples 32 --seq-len 128 --heldout-samples 8 --no-speed"
    passing = Runner(tmp_path)
    given = {"model": str(stories_folder), "arguments": f"--k 2 {text}", "output": "first"}
    steps = list(passing.action(ROOT, given))
    assert codes_of(steps) == {"Linearize and verify": 0, "Show": 0}, said_by(steps)
    summary = passing.summary.read_text()
    assert "# nbl-export report: PASS" in summary and "![" not in summary
    assert "::error" not in said_by(steps)

    worse = Runner(tmp_path)
    worse.summary.unlink()
    given |= {"arguments": f"--k 5 {text} --max-ppl-ratio 1.01", "output": "second"}
    given |= {"compare-with": "first", "bounds": "--max-ppl-increase 1.01"}
    steps = list(worse.action(ROOT, given))
    assert codes_of(steps) == {"Linearize and verify": 1, "Compare": 1, "Show": 0}, said_by(steps)
    assert "::error title=nbl-export: perplexity bound::perplexity × " in said_by(steps)
    shown = worse.summary.read_text()
    assert "# nbl-export report: FAIL" in shown and "FAIL" in shown.split("# nbl-export report")[0]


def test_words_of_the_inputs_are_no_code(stories_folder: Path, tmp_path: Path) -> None:
    given = {
        "model": f"{stories_folder}/none$(touch harm)",
        "arguments": "--k 1; touch harm",
        "output": "out`touch harm`",
    }
    steps = list(Runner(tmp_path).action(ROOT, given))
    assert codes_of(steps)["Linearize and verify"] == 2, said_by(steps)
    assert not (tmp_path / "harm").exists() and "There is no report" in said_by(steps)


def test_words_without_an_end_are_refused_in_a_sentence(tmp_path: Path) -> None:
    steps = list(Runner(tmp_path).action(ROOT, {"model": "m", "arguments": "--calibration 'a"}))
    assert codes_of(steps)["Linearize and verify"] == 2
    assert "::error title=nbl-export::arguments: No closing quotation" in said_by(steps)
    assert "Traceback" not in said_by(steps)


def test_an_input_that_the_action_does_not_have_is_a_mistake_of_the_workflow(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no input modle"):
        list(Runner(tmp_path).action(ROOT, {"modle": "m"}))


def test_a_job_ends_with_the_step_that_fails(tmp_path: Path) -> None:
    workflow = tmp_path / "workflow.yml"
    steps = [{"uses": "actions/checkout@v4"}, *({"name": n, "run": r} for n, r in RUNS.items())]
    workflow.write_text(yaml.safe_dump({"jobs": {"gate": {"steps": steps}}}))
    found = list(Runner(tmp_path).workflow(workflow))
    assert codes_of(found) == {"says": 0, "fails": 3} and said_by(found) == "first\n"


RUNS = {"says": "echo first", "fails": "exit 3", "never": "echo last"}


def test_the_job_of_gitlab_runs_as_docs_has_it(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"## GitLab CI\n+```yaml\n(.*?)```", page, re.S)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(stories_folder)
    (tmp_path / "corpus.jsonl.gz").symlink_to(stories_text)
    smaller = "--k 2 --samples 16 --seq-len 128 --no-speed"
    pipeline = tmp_path / ".gitlab-ci.yml"
    pipeline.write_text(snippet.replace("--k 8", smaller).replace("1.15", "1.01"), encoding="utf-8")
    (step,) = Runner(tmp_path).workflow(pipeline)
    # The gate fails, and what the job keeps of it is there: the report, the log, and what the server reads.
    assert (step.name, step.code) == ("linearize", 1), step.said
    job = yaml.safe_load(snippet)["linearize"]
    kept = [*job["artifacts"]["paths"], *job["cache"]["paths"], job["artifacts"]["reports"]["junit"]]
    assert all((tmp_path / path).exists() for path in kept)
    assert "<failure" in (tmp_path / job["artifacts"]["reports"]["junit"]).read_text(encoding="utf-8")
    assert "perplexity bound" in (tmp_path / "out.log").read_text(encoding="utf-8")


def codes_of(steps: list[Step]) -> dict[str, int]:
    return {step.name: step.code for step in steps}


def said_by(steps: list[Step]) -> str:
    return "".join(step.said for step in steps)
