"""Run a pipeline here as its server would: python scripts/local_runner.py WORKFLOW.yml

A workflow of GitHub Actions whose steps are commands or composite actions of this repository, or a .gitlab-ci.yml. Of
each step it prints what it said and its exit code. What other actions do (checkout, caches, artifacts) and what
installs this package is left out: both are here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """What one step did: its name, its exit code, and all that it said."""

    name: str
    code: int
    said: str


class Runner:
    """Runs steps in ``folder``; what they add to the job summary is in ``summary``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = folder / "summary.md"

    def action(self, folder: Path, given: Mapping[str, str]) -> Iterator[Step]:
        """The steps of the composite action in ``folder``, with its inputs as ``given``."""
        action: Any = yaml.safe_load((folder / "action.yml").read_text(encoding="utf-8"))
        if unknown := set(given) - set(action["inputs"]):
            raise ValueError(f"{folder}/action.yml has no input {', '.join(sorted(unknown))}")
        inputs = {
            name: str(given.get(name, one.get("default", ""))) for name, one in action["inputs"].items()
        }
        failed = False
        for step in action["runs"]["steps"]:
            condition = step.get("if", "")
            asked = all(inputs[name] != "" for name in re.findall(r"inputs\.([\w-]+) != ''", condition))
            if not asked or (failed and "always()" not in condition) or "run" not in step:
                continue
            values = {name: filled(value, inputs) for name, value in step.get("env", {}).items()}
            if done := self.script(step["name"], step["run"], values | {"GITHUB_ACTION_PATH": str(folder)}):
                failed |= done.code != 0
                yield done

    def script(self, name: str, script: str, values: Mapping[str, str]) -> Step | None:
        """One script of bash; None for one that only installs."""
        lines = [line for line in script.splitlines() if not re.match(r"(python -m )?pip install", line)]
        if not any(line.strip() for line in lines):
            return None
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        here = {"PATH": path, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(self.summary)}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", "\n".join(lines)],
            cwd=self.folder,
            env={**os.environ, **here, **values},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Step(name, done.returncode, done.stdout)

    def workflow(self, path: Path) -> Iterator[Step]:
        """Every job of a workflow of GitHub Actions, or of a .gitlab-ci.yml, until one of its steps fails."""
        pipeline: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "jobs" not in pipeline:
            for name, job in pipeline.items():
                if done := self.script(name, "\n".join(job["script"]), {}):
                    yield done
            return
        for name, job in pipeline["jobs"].items():
            for step in job["steps"]:
                code = 0
                for done in self._step(name, step):
                    code |= done.code
                    yield done
                if code:
                    break

    def _step(self, job: str, step: Mapping[str, Any]) -> Iterator[Step]:
        if "run" in step:
            if done := self.script(step.get("name", job), step["run"], step.get("env", {})):
                yield done
        elif step["uses"].startswith("./"):
            yield from self.action(self.folder / step["uses"], step.get("with", {}))


def filled(text: str, inputs: Mapping[str, str]) -> str:
    """``text`` with the inputs that it names."""
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], text)


def main() -> int:
    worst = 0
    for step in Runner(Path.cwd()).workflow(Path(sys.argv[1])):
        print(f"{step.said}{step.name}: exit code {step.code}", flush=True)
        worst = worst or step.code
    return worst


if __name__ == "__main__":
    sys.exit(main())
