"""Hold an evaluation as one JSON value with a versioned schema, and draw it.

``eval.json`` is the source; ``eval.md``, the terminal's tables and ``eval-junit.xml`` are drawn from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nbl_export.evaluate.results import Compared, Estimate, MeanRecovery, Means, RetrievalResult, TaskResult
from nbl_export.report.drawing import Table, number
from nbl_export.report.render import write_judged, write_junit
from nbl_export.report.schema import Header, load_judged
from nbl_export.settings import EvalSettings


@dataclass(frozen=True)
class Evaluation(Header):
    """Everything that ``nbl-export eval`` found: an entry for each task and context length, and their means.

    Checks are there only where a recovery was asked for, and without any an evaluation passes.
    """

    SCHEMA: ClassVar[str] = "nbl-export/eval/1"
    VERDICTS: ClassVar[tuple[str, ...]] = ("passed", "failed", "no gate")

    settings: EvalSettings
    tasks: tuple[TaskResult, ...]
    retrieval: tuple[RetrievalResult, ...]
    mean: Means

    @property
    def passed(self) -> bool:
        """No gate failed, and where there is one, something could be judged by it."""
        return not self.checks or super().passed

    @property
    def verdict(self) -> str:
        """What no gate was asked of is not called passed."""
        return super().verdict if self.checks else "no gate"


def load_evaluation(path: Path) -> Evaluation:
    """Read ``eval.json``; raises :class:`InputError` for anything else."""
    return load_judged(Evaluation, path, "evaluation", "run `nbl-export eval` again")


NAMES = ("eval.json", "eval.md", "eval-junit.xml")


def write_evaluation(folder: Path, value: Evaluation) -> list[Path]:
    """Write the evaluation into ``folder``, each file atomically; JUnit only where there are checks."""
    asked = value.settings
    said = f"; seed {asked.seed}, {asked.few_shot or 'no'} few-shot examples, {asked.limit or 'all'} rows of each task"
    paths = write_judged(folder, "eval", "evaluation", value, evaluation_tables(value), said)
    if value.checks:
        paths.append(folder / NAMES[2])
        write_junit(paths[-1], "nbl-export eval", value)
    return paths


_COLUMNS = ("", "n", "guess", "base", "linear", "change", "recovery", "above chance")
_LEGEND = (
    "Percent ± standard error over the documents, which both models answer; recovery is linearized / base; guess is "
    "what chance scores."
)
_CHOICE = (
    "Choice: the right code is the most likely of those hidden in the text; exact: greedy decoding writes it. "
    "The mean is of choice."
)


def evaluation_tables(value: Evaluation, brief: bool = False) -> list[Table]:
    """The tasks, retrieval by length and by depth; what was not asked has no table.

    ``brief`` keeps what 80 columns hold.
    """
    tasks = [
        row
        for task in value.tasks
        for row in (
            *(_row(f"{task.name}, {task.scored}", task.documents, one) for one in [task.headline] if one),
            *(
                (
                    f"{task.name}, {name}",
                    str(task.documents),
                    "",
                    *(number(v, ".4g") for v in both),
                    "",
                    "",
                    "",
                )
                for name, both in without_recovery(task)
            ),
        )
    ]
    note = _LEGEND + " The documents are a sample, the same for both." * any(
        t.documents < t.total for t in value.tasks
    )
    retrieval = [
        _row(f"{entry.context:,} tokens, {way}", entry.questions, getattr(entry, way))
        for way in ("choice", "exact")
        for entry in value.retrieval
    ]
    by_depth = tuple(
        (
            f"{entry.context:,} tokens",
            *(f"{100 * d.base:.0f} → {100 * d.linearized:.0f}" for d in entry.depths),
        )
        for entry in value.retrieval
    )
    means, width = value.mean, len(_COLUMNS) - brief
    tables = [
        _table("Tasks: base and linearized graph", tasks, means.tasks, note, width),
        _table("Retrieval: codes hidden in held-out text", retrieval, means.retrieval, _CHOICE, width),
        Table(
            "Retrieval by depth, choice: base → linearized, percent",
            ("", *(d.depth for entry in value.retrieval[:1] for d in entry.depths)),
            by_depth,
            "Depth: where in the text the code stands, from its beginning to its end.",
        ),
    ]
    return [table for table in tables if table.rows]


def without_recovery(task: TaskResult) -> list[tuple[str, tuple[float, float]]]:
    """The figures of both graphs of which no recovery can be stated, by name: perplexities."""
    plain = task.figures.keys() - task.metrics
    return [(name, (both.base, both.linearized)) for name, both in task.figures.items() if name in plain]


def _table(
    title: str, rows: list[tuple[str, ...]], mean: MeanRecovery | None, note: str, width: int
) -> Table:
    if mean:
        above = _percent(mean.above_chance)
        rows = [*rows, ("mean", *[""] * 5, _percent(mean.recovery), above)]
        note += (
            f" With chance subtracted from both scores, over the {mean.above_chance_tasks} of {mean.tasks} where the "
            f"base is two standard errors above it: {above} %."
            if above
            else " The base is nowhere two standard errors above chance, so recovery says little."
        )
    return Table(title, _COLUMNS[:width], tuple(row[:width] for row in rows), note)


def _row(name: str, documents: int, found: Compared) -> tuple[str, ...]:
    guess = f"{100 * found.chance:.0f}" if found.chance else ""
    scores = (_percent(one) for one in (found.base, found.linearized))
    rest = (_percent(found.recovery), _percent(found.above_chance))
    return (name, str(documents), guess, *scores, _percent(found.difference, "+"), *rest)


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    return f"{100 * estimate.value:{sign}.1f} ± {100 * estimate.se:.1f}" if estimate else ""
