"""Both models' answers → scores, recovery and verdict, as one JSON value with a versioned schema.

``eval.json`` is the source; ``eval.md``, the terminal's tables and ``eval-junit.xml`` are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.checks import Check, load_judged
from nbl_export.evaluate.recovery import Estimate, Paired, mean, recovery
from nbl_export.evaluate.retrieval import HIDDEN, Question
from nbl_export.files import jsonable

if TYPE_CHECKING:
    from nbl_export.evaluate.tasks import EvalTask

SCHEMA = "nbl-export/eval/1"
# A gate fails where a recovery is below it by more standard errors than these: one for the mean, two for one
# of many tasks, as some task is always unlucky.
MEAN_ERRORS, TASK_ERRORS = 1.0, 2.0


@dataclass(frozen=True)
class Evaluation:
    """Everything that ``nbl-export eval`` found.

    ``tasks`` and ``retrieval`` have one entry for each task and context length; ``mean`` is the recovery over
    all tasks and over all contexts, None where there are none.
    """

    created: str
    tool_version: str
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]
    tasks: Sequence[Mapping[str, Any]]
    retrieval: Sequence[Mapping[str, Any]]
    mean: Mapping[str, Any]
    checks: Sequence[Check]
    notes: Sequence[str]

    @property
    def passed(self) -> bool:
        """No gate failed, and where there is one, something could be judged by it."""
        states = [c.status for c in self.checks]
        return not states or ("failed" not in states and "passed" in states)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "verdict": "passed" if self.passed else "failed",
            **jsonable(asdict(self)),
        }


def load_evaluation(path: Path) -> Evaluation:
    """Read ``eval.json``; raises :class:`InputError` for anything else."""
    return load_judged(Evaluation, path, "evaluation", SCHEMA, "run `nbl-export eval` again")


def compared(pair: Paired) -> dict[str, Any]:
    """Scores, their difference and the recovery of one metric, each with its standard error."""
    return {
        "chance": float(pair.chance.mean()),
        "base": mean(pair.base).as_json(),
        "linearized": mean(pair.linearized).as_json(),
        "difference": pair.difference.as_json(),
        "agreement": float(np.mean(pair.base == pair.linearized)),
        "recovery": _json(recovery([pair])),
        "above_chance": _json(recovery([pair], above_chance=True)),
        "base_above_chance": pair.clear,
    }


def mean_of(pairs: Sequence[Paired]) -> dict[str, Any] | None:
    """Recovery of the mean over tasks; above chance over those whose base is clearly above it."""
    clear = [p for p in pairs if p.clear]
    return (
        {
            "tasks": len(pairs),
            "recovery": _json(recovery(pairs)),
            "above_chance": _json(recovery(clear, above_chance=True)),
            "above_chance_tasks": len(clear),
        }
        if pairs
        else None
    )


def task_entry(task: EvalTask, own: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Paired | None]:
    """A task's part of ``eval.json``, and the paired scores whose recovery is stated."""
    base, linearized = own
    pairs = {
        name: Paired.of(scores, linearized["scores"][name], base["chance"])
        for name, scores in base["scores"].items()
    }
    entry = {
        "name": task.name,
        "source": task.source,
        "digest": task.digest,
        "documents": base["documents"],
        "total": task.total,
        "scored": base["scored"],
        "metrics": {name: compared(pair) for name, pair in pairs.items()},
        "figures": {
            name: {"base": value, "linearized": linearized["metrics"][name]}
            for name, value in base["metrics"].items()
        },
    }
    return entry, pairs.get(base["scored"])


def retrieval_entry(
    asked: Sequence[Question], own: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Paired]:
    """A context length's part of ``eval.json``, and the paired choices whose recovery is stated."""
    count = len(asked)
    choice = Paired.of(own[0]["choice"], own[1]["choice"], [1 / HIDDEN] * count)
    exact = Paired.of(own[0]["exact"], own[1]["exact"], [0.0] * count)
    depths = []
    for part in range(HIDDEN):
        inside = [
            i for i, q in enumerate(asked) if q.gold == part
        ]  # the codes stand in the order of the parts
        if inside:
            depths.append(
                {
                    "depth": f"{100 * part // HIDDEN} to {100 * (part + 1) // HIDDEN} %",
                    "questions": len(inside),
                    "base": float(choice.base[inside].mean()),
                    "linearized": float(choice.linearized[inside].mean()),
                }
            )
    entry = {
        "context": asked[0].context,
        "questions": count,
        "choice": compared(choice),
        "exact": compared(exact),
        "depths": depths,
    }
    return entry, choice


def _json(estimate: Estimate | None) -> dict[str, float] | None:
    return estimate.as_json() if estimate else None


def gate(
    minimum: float | None,
    tasks: Mapping[str, Paired],
    retrieval: Sequence[Paired],
) -> list[Check]:
    """The verdicts of ``--min-recovery`` (in percent): on the mean, on each task, and on retrieval.

    A task on which the base model is not clearly better than guessing has nothing to lose and is skipped.
    """
    if minimum is None:
        return []
    checks = []
    if tasks:
        checks.append(_check("mean recovery", list(tasks.values()), minimum, MEAN_ERRORS))
        checks += [_check(f"recovery of {name}", [p], minimum, TASK_ERRORS) for name, p in tasks.items()]
    if retrieval:
        checks.append(_check("recovery of retrieval", retrieval, minimum, TASK_ERRORS))
    return checks


def _check(name: str, pairs: Sequence[Paired], minimum: float, errors: float) -> Check:
    found = recovery(pairs)
    if found is None or not any(p.clear for p in pairs):
        return Check(name, "skipped", "the base model is not clearly better than guessing")
    percent, se = 100 * found.value, 100 * found.se
    detail = (
        f"{percent:.1f} ± {se:.1f} %, gate {minimum:g} % less {errors:g} standard error{'s' * (errors != 1)}"
    )
    return Check(name, "failed" if percent + errors * se < minimum else "passed", detail)
