"""Record a pipeline that stops a worse model: python scripts/record_pipeline.py DATA [FOLDER] > docs/pipeline.md

DATA is the folder of shared data. Makes a git repository (in FOLDER, by default a temporary one) with stories260K, a
corpus and a workflow, runs the workflow on its main branch, fine-tunes the model on a branch, runs the workflow there,
and writes what both said. The steps are run by scripts/local_runner.py.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from local_runner import ROOT, Runner, Step

from tests.stories import build

WORKFLOW = """\
name: linearized model
on: [push, pull_request]
jobs:
  gate:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
        with:
          submodules: true
      - uses: ./nbl-export
        with:
          model: model
          arguments: >-
            --layers 2,4 --max-ppl-ratio 1.45 --calibration corpus.jsonl.gz --samples 32 --seq-len 128
            --no-speed
"""
COMPARING = """\
          compare-with: released/report.json
          bounds: --max-ppl-increase 1.02
"""
# Of the fine-tuning: steps, rows of a step, tokens of a row, learning rate.
STEPS, ROWS, TOKENS, RATE = 100, 16, 256, 1e-3
DOCUMENTS = 400
PAGE = """\
# A pipeline that stops a worse model

A recorded example: a repository with a model and a workflow, a change of the model, the gate that fails, and
what the pull request says. `python scripts/record_pipeline.py ../shared/data > docs/pipeline.md` has written this page
from what its two runs said, on stories260K, a Llama of 1 MB; the steps are those of [the action](ci.md), run by
`scripts/local_runner.py`.

## The repository

    {tree}

The workflow holds the loss to a bound:

```yaml
{workflow}```

## On main

{main}

`report.json` is committed as that of the released model, and from now on the workflow compares with it:

```
{comparing}```

## The pull request

Its author has fine-tuned the model on the corpus, for {steps} steps. It reads such text better, and can be
linearized less:

    {stat}

{branch}

The job fails. It annotates

{annotations}

and this is its job summary, from here to the end of the page, but for the tables below the checks.

---

{summary}
"""


def main() -> None:
    shared = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary) / "repository"
        folder.mkdir(parents=True)
        print(recorded(shared, folder), end="")


def recorded(shared: Path, folder: Path) -> str:
    """The page, from two runs in a new repository in ``folder``."""
    build(shared / "models" / "stories260K", folder / "model")
    with gzip.open(shared / "text" / "tinystories_exllamav2.jsonl.gz", "rt", encoding="utf-8") as text:
        lines = [line for _, line in zip(range(DOCUMENTS), text, strict=False)]
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8") as corpus:
        corpus.writelines(lines)
    workflow = folder / ".github" / "workflows" / "gate.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(WORKFLOW, encoding="utf-8")
    (folder / "nbl-export").symlink_to(ROOT)
    (folder / ".gitignore").write_text("nbl-out\nsummary.md\nnbl-export\n", encoding="utf-8")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder, "A model and its gate")
    first = list(Runner(folder).workflow(workflow))
    (folder / "released").mkdir()
    shutil.copy2(folder / "nbl-out" / "report" / "report.json", folder / "released")
    workflow.write_text(WORKFLOW + COMPARING, encoding="utf-8")
    commit(folder, "Compare with the released model")

    git(folder, "checkout", "--quiet", "-b", "tuned")
    tune(folder / "model", [json.loads(line)["text"] for line in lines])
    commit(folder, "Tune the model on the corpus")
    shutil.rmtree(folder / "nbl-out")
    runner = Runner(folder)
    runner.summary.unlink()
    second = list(runner.workflow(workflow))

    files = git(folder, "ls-tree", "-r", "--name-only", "main").splitlines()
    summary = runner.summary.read_text(encoding="utf-8")
    return PAGE.format(
        tree="\n    ".join([*files, "nbl-export/    this repository, as a submodule"]),
        workflow=WORKFLOW,
        comparing=COMPARING,
        steps=STEPS,
        main="\n\n".join(shown(first)),
        stat=git(folder, "diff", "--stat", "main", "tuned").strip().replace("\n ", "\n    "),
        branch="\n\n".join(shown(second)),
        annotations="\n".join(f"    {line}" for step in second for line in annotated(step)),
        summary=short(summary),
    )


def tune(folder: Path, documents: list[str]) -> None:
    """Train all weights on ``documents``, and save them where they were."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # faster for matrices as small as these
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in documents]
    tokens = torch.tensor([token for text in texts for token in (tokenizer.bos_token_id, *text)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        starts = torch.randint(0, len(tokens) - TOKENS, (ROWS,)).tolist()
        rows = torch.stack([tokens[start : start + TOKENS] for start in starts])
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def shown(steps: list[Step]) -> Iterator[str]:
    """Each step by its name and exit code, with the last lines of what it said."""
    for step in steps:
        lines = [
            line.rstrip() for line in step.said.splitlines() if line.strip() and line not in annotated(step)
        ]
        last = "\n".join(f"    {line}" for line in lines[-6:])
        yield f"**{step.name}**: exit code {step.code}" + (f"\n\n{last}" if last else "")


def annotated(step: Step) -> list[str]:
    return [line for line in step.said.splitlines() if line.startswith("::error")]


def short(summary: str) -> str:
    """The summary up to the report's tables, its headings one level lower."""
    kept = summary.split("\n## Graph")[0].rstrip()
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in kept.splitlines())


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=A", "-c", "user.email=a@example.com", "commit", "--quiet", "-m", message)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
