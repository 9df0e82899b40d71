"""Find and run tasks of EleutherAI's lm-evaluation-harness: from local rows, or by name from the Hub.

The harness builds the prompts and scores the answers; nbl-export's decode loop (:mod:`nbl_export.evaluate.harness`)
generates them. Local rows are .jsonl files; shapes.toml says by their fields how rows are asked.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.calibrate.documents import documents
from nbl_export.errors import InputError, NblError, first_line
from nbl_export.files import jsonable, read_table, sha256_of_json, user_path
from nbl_export.models.running import quiet
from nbl_export.packages import missing
from nbl_export.settings import EvalSettings

if TYPE_CHECKING:
    from nbl_export.evaluate.harness import DecoderLM

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# The metric whose recovery is reported, for a task that does not define one: the first of these it has.
_HEADLINES = ("acc_norm", "acc", "exact_match", "f1")
# Few-shot examples are drawn from this many rows that are not asked; more would only enlarge the digest.
_POOL = 64


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
    """One task of the harness, ``built``; ``digest`` identifies its content and how it is asked.

    ``indices`` are the documents to ask, None for all; ``total`` is their number.
    """

    name: str
    source: str
    digest: str
    total: int
    built: Any
    indices: Sequence[int] | None = None
    scored: str | None = None


def check_tasks(sources: Sequence[str]) -> None:
    """Refuse, before any work, ``sources`` that are no tasks: files and folders that are not there, unknown names.

    Raises the errors of :func:`find_tasks`, as far as no task has to be read for them, and
    :class:`MissingDependencyError` with the pip command if the harness is not installed.
    """
    named = [source for source in sources if task_files(source) is None]
    if sources and importlib.util.find_spec("lm_eval") is None:
        raise missing("lm-eval", "A task")
    for name in named:
        if not name.endswith((".yaml", ".yml")) and name not in _manager().all_tasks:
            close = difflib.get_close_matches(name, _manager().all_tasks, 3)
            hint = f" (near: {', '.join(close)})" if close else ""
            raise InputError(
                f"The task {name} is neither a local file or folder nor a task of lm-evaluation-harness{hint}: "
                "check the spelling; `lm-eval ls tasks` lists them."
            )


def find_tasks(sources: Sequence[str], settings: EvalSettings) -> list[EvalTask]:
    """The tasks named by ``sources``: local files and folders, names of the harness's tasks, its .yaml files.

    All checks are done here, before any work. Raises :class:`InputError`, and :class:`MissingDependencyError` without
    the harness.
    """
    check_tasks(sources)
    found: dict[str, EvalTask] = {}
    for source in sources:
        files = task_files(source)
        own = _named(source, settings) if files is None else [task_of_rows(file, settings) for file in files]
        for task in own:
            if (other := found.setdefault(task.name, task)) is not task:
                raise InputError(
                    f"Two tasks are called {task.name}: {other.source} and {task.source}; rename one of them."
                )
    return list(found.values())


# local rows ---------------------------------------------------------------------------------------


@cache
def shapes() -> Mapping[str, Any]:
    """The tables of shapes.toml, more specific ones first."""
    return read_table(Path(__file__).with_name("shapes.toml"))


def task_files(source: str) -> list[Path] | None:
    """The files of a local source; None for a name. Raises :class:`InputError` for a path without tasks."""
    path, yaml = user_path(source, "The task"), source.endswith((".yaml", ".yml"))
    if path.is_dir() or (path.is_file() and not yaml):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if found := [p for p in files if p.is_file() and p.name.lower().endswith(SUFFIXES)]:
            return found
        raise InputError(f"{source} has no tasks: give a {', '.join(SUFFIXES)} file, or a folder of them.")
    ends = source.lower().endswith((*SUFFIXES, ".json", ".gz", ".zst"))
    if (source.startswith((".", "/", "~")) or ends) and not path.exists():
        raise InputError(f"The task {source} does not exist: check the path.")
    return None


def task_of_rows(path: Path, settings: EvalSettings) -> EvalTask:
    """The harness's task for the rows of a local file, which are passed in memory.

    ``settings.limit`` rows are sampled, the same ones for the same seed. Raises :class:`InputError` for invalid rows,
    with file and line.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    placed = list(documents([str(path)], "", _object))
    if not placed:
        raise InputError(f"{path} has no rows: give another file.")
    where, first = placed[0]
    shape = next((one for one in shapes().values() if set(one["fields"]) <= first.keys()), None)
    if shape is None:
        known = "; ".join(", ".join(one["fields"]) for one in shapes().values())
        raise InputError(
            f"{where}: no task has rows with the fields {', '.join(first) or 'none'}: use one of these "
            f"sets of fields: {known}."
        )
    for where, row in placed:
        if problem := _problem(row, shape):
            raise InputError(f"{where}: {problem}.")
    rows = [{name: row[name] for name in shape["fields"]} for _, row in placed]
    name = path.name[: -len(next(s for s in SUFFIXES if path.name.lower().endswith(s)))]
    few_shot = settings.few_shot or 0
    asked, pool = sample(len(rows), settings.limit, few_shot, f"{settings.seed}:{name}", str(path))
    splits = {"test": [rows[i] for i in asked], **({"examples": [rows[i] for i in pool]} if few_shot else {})}
    config = copy.deepcopy(shape["task"]) | {
        "task": name,
        "custom_dataset": lambda **_metadata: {k: datasets.Dataset.from_list(v) for k, v in splits.items()},
        "test_split": "test",
        "fewshot_split": "examples" if few_shot else None,
        "num_fewshot": few_shot,
    }
    with quiet():
        built = ConfigurableTask(config=config)
    digest = _digest(splits, shape, settings)
    return EvalTask(name, path.name, digest, len(rows), built, scored=shape["scored"])


def _digest(content: Any, how: Any, settings: EvalSettings) -> str:
    asked = {
        "few_shot": settings.few_shot,
        "seed": settings.seed,
        "chat_template": settings.chat_template,
        "lm_eval": version("lm_eval"),
    }
    return sha256_of_json([content, how, asked])


def _object(row: Any, _field: str, where: str, _folder: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object: a .jsonl file has one a line.")
    return where, row


_WANTED = {
    "choices": "a list of two or more texts, none of them empty",
    "gold": "the number of one of the choices, counted from 0",
}


def _problem(row: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    """What is wrong with a row, in words; nothing if it can be asked."""
    for name in shape["fields"]:
        value = row.get(name)
        if name == "choices":
            good = isinstance(value, list) and len(value) > 1 and all(isinstance(c, str) and c for c in value)
        elif name == "gold":
            good = type(value) is int and 0 <= value < len(row["choices"])
        else:
            good = isinstance(value, str) and bool(value.strip() or name not in ("target", "answer"))
        if not good:
            said = f"it must be {_WANTED.get(name, 'text')}, as in every row of the file"
            return f"{name!r} is {value!r:.80}; {said}" if name in row else f"no field {name!r}; {said}"
    if "blank" in shape and "_" not in row[shape["blank"]]:
        return f"{shape['blank']!r} has no blank (_) for the choices"
    return ""


def sample(
    total: int, limit: int | None, few_shot: int, seed: str, where: str
) -> tuple[list[int], list[int]]:
    """The indices of the rows that are asked, in order, and of those for few-shot examples, which are disjoint."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    spare = min(_POOL, max(few_shot, total - (limit or total))) if few_shot else 0
    if total - spare < 1:
        raise InputError(
            f"{where} has {total} rows: too few for --few-shot {few_shot} and a row to ask; lower it."
        )
    asked = order[: min(limit or total, total - spare)]
    return sorted(asked), sorted(order[len(asked) : len(asked) + spare])


# the harness's own tasks --------------------------------------------------------------------------


@cache
def _manager() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _named(name: str, settings: EvalSettings) -> list[EvalTask]:
    """The tasks with that name, which may be a group; their documents are downloaded."""
    try:
        with quiet():
            tasks = _manager().load(name)["tasks"]
            return [_from_harness(own, task, name, settings) for own, task in tasks.items()]
    except NblError:
        raise
    except Exception as error:  # the harness, the Hub client and the tasks' own code raise anything
        raise InputError(
            f"The task {name} cannot be loaded ({type(error).__name__}: {first_line(error)[:200]}): its data comes "
            "from the Hugging Face Hub, so check the network."
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
    # A function without source code is shown with its address, which changes in every run.
    config = re.sub(r" at 0x[0-9a-fA-F]+", "", str(sorted(task.dump_config().items())))
    documents = [jsonable(dict(task.eval_docs[i])) for i in indices]
    digest = _digest(documents, config, settings)
    return EvalTask(own, source, digest, total, task, None if len(indices) == total else indices)


def run_task(lm: DecoderLM, task: EvalTask, settings: EvalSettings) -> Outcome:
    """Run ``task`` with the model ``lm``; raises :class:`InputError` if the harness cannot."""
    from lm_eval.evaluator import evaluate

    try:
        with quiet():
            task.built.set_fewshot_seed(settings.seed)  # the same examples for both models
            found = evaluate(
                lm,
                {"tasks": {task.name: task.built}, "groups": {}},
                samples=None if task.indices is None else {task.name: list(task.indices)},
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=settings.chat_template,
            )
    except NblError:
        raise
    except Exception as error:
        raise InputError(
            f"lm-evaluation-harness does not run the task {task.name} ({type(error).__name__}: "
            f"{first_line(error)[:200]}): leave it out."
        ) from error
    return _outcome(task, found["results"][task.name], found["samples"][task.name])


def _outcome(task: EvalTask, results: Mapping[str, Any], samples: Sequence[Any]) -> Outcome:
    # A task may have several filters of the answers; the first one is used.
    first = samples[0]["filter"]
    filtered = [s for s in samples if s["filter"] == first]
    metrics = {
        name: float(value)
        for key, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key.endswith(f",{first}")
        for name in [key.rpartition(",")[0]]
        if not name.endswith("_stderr")
    }
    better = task.built.higher_is_better()
    scores = {
        name: [float(s[name]) for s in filtered]
        for name in metrics
        if better.get(name) and all(isinstance(s.get(name), (int, float)) for s in filtered)
    }
    # Recovery is only defined for a metric that is the mean of its documents' scores.
    scores = {n: v for n, v in scores.items() if abs(sum(v) / len(v) - metrics[n]) < 1e-9}
    scored = task.scored if task.scored in scores else next((n for n in _HEADLINES if n in scores), None)
    chosen = task.built.OUTPUT_TYPE == "multiple_choice"
    chance = [1.0 / len(task.built.doc_to_choice(s["doc"])) if chosen else 0.0 for s in filtered]
    return Outcome(metrics, scores, chance, scored, len(filtered))
