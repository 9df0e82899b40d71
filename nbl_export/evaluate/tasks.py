"""Tasks of EleutherAI's lm-evaluation-harness: from local rows in memory, or by name from the Hub.

The harness builds the prompts and scores the answers; nbl-export's decode loop (:mod:`nbl_export.evaluate.harness`)
generates them. The harness is an optional dependency, imported only in these two modules.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError, MissingDependencyError, NblError
from nbl_export.evaluate.local_tasks import LocalTask, local_tasks, sample, task_files
from nbl_export.files import jsonable, sha256_of_json
from nbl_export.models.load import quiet
from nbl_export.packages import part
from nbl_export.settings import EvalSettings

if TYPE_CHECKING:
    from nbl_export.evaluate.harness import DecoderLM

# The metric whose recovery is reported, for a task that does not define one: the first of these it has.
_HEADLINES = ("acc_norm", "acc", "exact_match", "f1")


def require_lm_eval() -> None:
    """Raise :class:`MissingDependencyError` with the pip command if the harness is not installed."""
    for name in ("lm_eval", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"Tasks need {name}: {part('lm-eval').pip}.")


@dataclass(frozen=True)
class Outcome:
    """One model's result on one task.

    ``metrics`` are the harness's results by name; ``scores`` [documents] are those of each document, for metrics that
    are means of them and higher is better; ``chance`` [documents] are the scores of random guessing; ``scored`` names
    the metric whose recovery is reported, None if there is none.
    """

    metrics: Mapping[str, float]
    scores: Mapping[str, Sequence[float]]
    chance: Sequence[float]
    scored: str | None
    documents: int


@dataclass(frozen=True)
class EvalTask:
    """One task: ``digest`` identifies its content; ``build`` creates the harness's task.

    ``indices`` are the documents to ask, None for all; ``total`` is their number.
    """

    name: str
    source: str
    digest: str
    total: int
    build: Callable[[], Any]
    indices: Sequence[int] | None = None
    scored: str | None = None
    guessed: bool = True


def check_tasks(sources: Sequence[str]) -> None:
    """Refuse, before any work, ``sources`` that are no tasks: files and folders that are not there, unknown names.

    Raises the errors of :func:`find_tasks`, as far as no task has to be read for them.
    """
    named = [source for source in sources if task_files(source) is None]
    if sources:
        require_lm_eval()
    _check_names(named)


def find_tasks(sources: Sequence[str], settings: EvalSettings) -> list[EvalTask]:
    """The tasks named by ``sources``: local files and folders, names of the harness's tasks, its .yaml files.

    All checks are done here, before any work. Raises :class:`InputError`, and :class:`MissingDependencyError` without
    the harness.
    """
    found: list[EvalTask] = []
    named: list[str] = []
    for source in sources:
        local = local_tasks(source, settings.limit, settings.few_shot or 0, settings.seed)
        if local is None:
            named.append(source)
        found += [_from_rows(task, settings) for task in local or ()]
    require_lm_eval()
    found += _named(named, settings)
    seen: dict[str, str] = {}
    for task in found:
        if task.name in seen:
            raise InputError(
                f"Two tasks are called {task.name}: {seen[task.name]} and {task.source}; rename one of them."
            )
        seen[task.name] = task.source
    return found


def _from_rows(task: LocalTask, settings: EvalSettings) -> EvalTask:
    digest = sha256_of_json([task.digest, _asked(settings)])
    return EvalTask(
        task.name,
        task.path.name,
        digest,
        task.total,
        lambda: task_of_rows(task, settings.few_shot or 0),
        scored=task.shape.scored,
        guessed=task.shape.chance == "choices",
    )


def _asked(settings: EvalSettings) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "few_shot": settings.few_shot,
        "seed": settings.seed,
        "chat_template": settings.chat_template,
        "lm_eval": version("lm_eval"),
    }


def task_of_rows(task: LocalTask, few_shot: int) -> Any:
    """The harness's task for local rows, which are passed in memory; nothing is written or downloaded."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": datasets.Dataset.from_list([dict(row) for row in task.rows])}
    if few_shot:
        splits["examples"] = datasets.Dataset.from_list([dict(row) for row in task.pool])
    config = copy.deepcopy(dict(task.shape.task)) | {
        "task": task.name,
        "custom_dataset": lambda **_metadata: splits,
        "test_split": "test",
        "fewshot_split": "examples" if few_shot else None,
        "num_fewshot": few_shot,
    }
    with quiet():
        return ConfigurableTask(config=config)


def _named(names: Sequence[str], settings: EvalSettings) -> list[EvalTask]:
    _check_names(names)
    return [task for name in names for task in _loaded(_manager(), name, settings)]


@cache
def _manager() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not name.endswith((".yaml", ".yml")) and name not in _manager().all_tasks:
            close = difflib.get_close_matches(name, _manager().all_tasks, 3)
            hint = f" (near: {', '.join(close)})" if close else ""
            raise InputError(
                f"The task {name} is neither a local file or folder nor a task of lm-evaluation-harness{hint}: "
                "check the spelling; `lm-eval ls tasks` lists them."
            )


def _loaded(manager: Any, name: str, settings: EvalSettings) -> list[EvalTask]:
    """The tasks with that name, which may be a group; their documents are downloaded."""
    try:
        with quiet():
            tasks = manager.load(name)["tasks"]
            return [_from_harness(own, task, name, settings) for own, task in tasks.items()]
    except NblError:
        raise
    except Exception as error:  # the harness, the Hub client and the tasks' own code raise anything
        raise InputError(
            f"The task {name} cannot be loaded ({type(error).__name__}: {_first_line(error)}): its data comes from "
            "the Hugging Face Hub, so check the network."
        ) from None


def _from_harness(own: str, task: Any, source: str, settings: EvalSettings) -> EvalTask:
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        kind = "images or sound" if getattr(task, "MULTIMODAL", False) else "generated code that it runs"
        raise InputError(f"The task {own} needs {kind}, which nbl-export does not support: leave it out.")
    kwargs = getattr(task.config, "generation_kwargs", None) or {}
    if kwargs.get("do_sample") or float(kwargs.get("temperature") or 0) > 0:
        raise InputError(
            f"The task {own} samples its answers, but nbl-export decodes greedily: leave it out."
        )
    if settings.few_shot is not None:
        task.set_config("num_fewshot", settings.few_shot)
    total = len(task.eval_docs)
    indices, _ = sample(total, settings.limit, 0, f"{settings.seed}:{own}", own)
    digest = sha256_of_json(
        {
            "documents": [jsonable(dict(task.eval_docs[i])) for i in indices],
            # A function without source code is shown with its address, which changes in every run.
            "config": re.sub(r" at 0x[0-9a-fA-F]+", "", str(sorted(task.dump_config().items()))),
            "asked": _asked(settings),
        }
    )
    return EvalTask(own, source, digest, total, lambda: task, None if len(indices) == total else indices)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")[:200]


def run_task(lm: DecoderLM, task: EvalTask, settings: EvalSettings) -> Outcome:
    """Run ``task`` with the model ``lm``; raises :class:`InputError` if the harness cannot."""
    from lm_eval.evaluator import evaluate

    built = task.build()

    try:
        with quiet():
            built.set_fewshot_seed(settings.seed)  # the same examples for both models
            found = evaluate(
                lm,
                {"tasks": {task.name: built}, "groups": {}},
                samples=None if task.indices is None else {task.name: list(task.indices)},
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=settings.chat_template,
            )
    except NblError:
        raise
    except Exception as error:
        raise InputError(
            f"lm-evaluation-harness does not run the task {task.name} ({type(error).__name__}: {_first_line(error)}): "
            "leave it out."
        ) from error
    return _outcome(task, built, found["results"][task.name], found["samples"][task.name])


def _outcome(task: EvalTask, built: Any, results: Mapping[str, Any], samples: Sequence[Any]) -> Outcome:
    # A task may have several filters of the answers; the first one is used.
    filters = list(dict.fromkeys(s["filter"] for s in samples))
    filtered = [s for s in samples if s["filter"] == filters[0]]
    metrics = {
        name: float(value)
        for key, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key.endswith(f",{filters[0]}")
        for name in [key.rpartition(",")[0]]
        if not name.endswith("_stderr")
    }
    better = built.higher_is_better()
    scores = {
        name: [float(s[name]) for s in filtered]
        for name in metrics
        if better.get(name) and all(isinstance(s.get(name), (int, float)) for s in filtered)
    }
    # Recovery is only defined for a metric that is the mean of its documents' scores.
    scores = {n: v for n, v in scores.items() if abs(sum(v) / len(v) - metrics[n]) < 1e-9}
    scored = task.scored if task.scored in scores else next((n for n in _HEADLINES if n in scores), None)
    return Outcome(metrics, scores, [_chance(task, built, s) for s in filtered], scored, len(filtered))


def _chance(task: EvalTask, built: Any, sample: Mapping[str, Any]) -> float:
    """The expected score of random guessing on a document: one over the number of choices."""
    if not task.guessed or built.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    return 1.0 / len(built.doc_to_choice(sample["doc"]))
