"""Both graphs + tasks → ``report/eval.json``: scores, recovery, and what looking up costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nbl_export import __version__
from nbl_export.errors import InputError
from nbl_export.files import read_sealed, sha256_of_json, write_sealed
from nbl_export.models.source import ModelSource
from nbl_export.models.tasks import Task
from nbl_export.progress import Listener
from nbl_export.records import from_json, to_json
from nbl_export.settings import EvalSettings
from nbl_export.settings.choices import RETRIEVAL_CONTEXTS
from nbl_export.stage_record import MODEL, SIDECARS, StageRecord
from nbl_export.stages.build import model_positions
from nbl_export.stages.rewrite import check_baseline, current_rewrite
from nbl_export.stages.run import Run, graphs_on, graphs_setting, opened
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.evaluate.results import Paired
    from nbl_export.evaluate.retrieval import Answers, Filler, Question
    from nbl_export.evaluate.tasks import EvalTask, Outcome
    from nbl_export.report.evaluation import Evaluation

T = TypeVar("T")

# What a kept answer is worth depends on how it was asked; a change there makes this another number.
_ASKED = 1
# A context for a model whose configuration sets no bound: what the longest default question needs, doubled.
_UNBOUNDED = 2048


@dataclass(frozen=True)
class _Graph:
    """One of the two graphs: ``digest`` of its files; ``role`` heads its progress."""

    role: str
    path: Path
    digest: str


@dataclass(frozen=True)
class _Answered:
    """What one graph answered: to the tasks by name, to the questions by their context."""

    tasks: dict[str, Outcome] = field(default_factory=dict)
    retrieval: dict[int, Answers] = field(default_factory=dict)


def evaluate(
    out: str | Path | Run,
    settings: EvalSettings,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Evaluation:
    """Tasks and retrieval on the baseline and on the linearized graph → ``report/``.

    What one graph answered on one task is kept in ``nbl/eval``, so that an interrupted run goes on from
    there and the baseline is asked once for all plans. A failed gate is in the value (``passed``), not an exception.
    """
    with opened(out, settings, listener, trust_remote_code, rehash, _check) as (run, resolved):
        return _evaluate(run, resolved)


def _check(_source: ModelSource, settings: EvalSettings, task: Task) -> None:
    if task.causal:
        from nbl_export.evaluate.tasks import check_tasks

        check_tasks(settings.tasks)


def _evaluate(run: Run, settings: EvalSettings) -> Evaluation:
    from nbl_export.evaluate.tasks import find_tasks
    from nbl_export.report.evaluation import load_evaluation, write_evaluation
    from nbl_export.runtime.session import require_onnxruntime

    require_onnxruntime()
    ws = run.workspace
    graphs = _graphs(ws)
    if settings.chat_template and not run.model.tokenizer.chat_template:
        raise InputError("This model's tokenizer has no chat template: leave out --chat-template.")
    positions = model_positions(ws)
    questions = _questions(run, settings, positions) if settings.retrieval else []
    tasks = find_tasks(settings.tasks, settings) if settings.tasks else []
    # The text of calibration is what retrieval hides its answers in.
    made_of = {
        MODEL: run.model.source.model,
        SIDECARS: run.model.source.sidecars,
        "rewrite": current_rewrite(ws).result,
        "calibrate": ws.require("calibrate").result,
        "tasks": sha256_of_json([t.digest for t in tasks]),
        "positions": str(positions),
    }

    device = run.on(settings.device)
    where = graphs_setting(device)

    def work(listener: Listener) -> list[Path]:
        answers = _Answers(run, graphs, tasks, questions, settings, positions, listener, where)
        with graphs_on(device, listener):
            found = answers()
        return write_evaluation(ws.report, _assembled(run, graphs, tasks, questions, settings, found))

    run.stage("eval", settings.as_json() | where, made_of, work, device)
    return load_evaluation(ws.report / "eval.json")


def _graphs(ws: Workspace) -> tuple[_Graph, _Graph]:
    check_baseline(ws)
    rewritten = current_rewrite(ws)
    exported = ws.require("export")
    return (
        _Graph("base", ws.baseline, _digest(ws, ws.baseline, exported)),
        _Graph("linearized", ws.model, _digest(ws, ws.model, rewritten, exported)),
    )


def _digest(ws: Workspace, graph: Path, record: StageRecord, shared: StageRecord | None = None) -> str:
    # The graph and its data files; what lies beside them is for consumers.
    prefix, base = (str(path.relative_to(ws.root)) for path in (graph, ws.baseline))
    files = {n: d for n, d in record.files.items() if n.startswith(prefix)}
    files |= {n: d for n, d in (shared.files if shared else {}).items() if n.startswith(f"{base}.")}
    return sha256_of_json(files)


def _questions(run: Run, settings: EvalSettings, positions: int | None) -> list[list[Question]]:
    """The questions of each context length; lengths asked for that the model cannot have are refused."""
    from nbl_export.evaluate.retrieval import ask, least_context

    filler, tokenizer = _filler(run), run.model.tokenizer

    def encode(text: str) -> list[int]:
        return [int(t) for t in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    least, most = least_context(filler, encode), positions or max(RETRIEVAL_CONTEXTS)
    contexts = settings.retrieval_contexts or [c for c in RETRIEVAL_CONTEXTS if least <= c <= most]
    if positions and max(contexts, default=0) > positions:
        raise InputError(
            f"--retrieval-contexts has {max(contexts):,} tokens, the model {positions:,} positions: ask for less."
        )
    if not contexts:
        raise InputError(
            f"Retrieval needs a context of {least} tokens, the model has {most} positions: leave it out with "
            "--no-retrieval."
        )
    return [
        ask(filler, encode, c, settings.retrieval_samples, settings.seed) for c in dict.fromkeys(contexts)
    ]


def _filler(run: Run) -> Filler:
    from nbl_export.batch.media_ids import words
    from nbl_export.calibrate.text import load_text
    from nbl_export.evaluate.retrieval import Filler

    text = load_text(run.workspace.text)
    return Filler(text.start, words(text.heldout).reshape(-1))


class _Answers:
    """Asks both graphs whatever is not kept from before; called, it gives all answers by role and name."""

    def __init__(
        self,
        run: Run,
        graphs: Sequence[_Graph],
        tasks: Sequence[EvalTask],
        questions: Sequence[Sequence[Question]],
        settings: EvalSettings,
        positions: int | None,
        listener: Listener,
        where: Mapping[str, str],
    ) -> None:
        self.run, self.graphs, self.tasks, self.questions = run, graphs, tasks, questions
        self.settings, self.positions, self.listener = settings, positions, listener
        self.where = where
        self.model = [run.model.source.model, run.model.source.sidecars]
        self.stream: Any = None
        self.kept = 0

    def __call__(self) -> dict[str, _Answered]:
        from nbl_export.evaluate.retrieval import Answers
        from nbl_export.evaluate.tasks import Outcome

        self.kept = asked = 0
        found: dict[str, _Answered] = {}
        for graph in self.graphs:
            answered = found[graph.role] = _Answered()
            with self._opened():
                for task in self.tasks:
                    answered.tasks[task.name] = self._ask(
                        Outcome, graph, task.digest, partial(self._task, graph, task)
                    )
                for questions in self.questions:
                    answered.retrieval[questions[0].context] = self._ask(
                        Answers,
                        graph,
                        sha256_of_json([asdict(q) for q in questions]),
                        partial(self._retrieval, graph, questions),
                    )
            asked += len(self.tasks) + len(self.questions)
        if self.kept:
            self.listener.note(f"eval: {self.kept} of {asked} results kept from before.")
        return found

    def _ask(self, kind: type[T], graph: _Graph, digest: str, ask: Callable[[], T]) -> T:
        """What is kept of what ``graph`` answered; if nothing is, it is asked, and kept."""
        path = self._path(graph, digest)
        value = _read(kind, path)
        self.kept += value is not None
        if value is None:
            value = ask()
            write_sealed(path, to_json(value))
        return value

    @contextmanager
    def _opened(self) -> Iterator[None]:
        # One graph is in memory at a time, and none if nothing is asked of it.
        try:
            yield
        finally:
            self.stream = None

    def _path(self, graph: _Graph, digest: str) -> Path:
        key = sha256_of_json(
            {
                "graph": graph.digest,
                "model": self.model,
                "asked": digest,
                "version": _ASKED,
                "positions": self.positions,
                **self.where,
            }
        )
        return self.run.workspace.evaluations / f"{key[:32]}.json"

    def _task(self, graph: _Graph, task: EvalTask) -> Outcome:
        from nbl_export.evaluate.harness import DecoderLM
        from nbl_export.evaluate.tasks import run_task

        stream, limits = self._open(graph)
        tokenizer, title = self.run.model.tokenizer, f"{graph.role}: {task.name}"
        lm = DecoderLM(stream, tokenizer, limits, self.listener, title)
        return run_task(lm, task, self.settings)

    def _retrieval(self, graph: _Graph, questions: Sequence[Question]) -> Answers:
        from nbl_export.evaluate.retrieval import HIDDEN, answer
        from nbl_export.evaluate.scoring import log_likelihoods

        stream, limits = self._open(graph)
        title = f"{graph.role}: {questions[0].context} tokens"
        with self.listener.task(title, len(questions) * HIDDEN, "answers") as task:
            return answer(lambda pairs: log_likelihoods(stream, pairs, limits, task.advance), questions)

    def _open(self, graph: _Graph) -> tuple[Any, Any]:
        from nbl_export.evaluate.scoring import Limits
        from nbl_export.runtime.ort import ort_stream
        from nbl_export.runtime.session import fit, session_bytes

        positions = self.positions or _UNBOUNDED
        if self.stream is None:
            # A small session is slower: in half precision it converts its weights in each pass.
            small = not fit(session_bytes(graph.path))
            self.stream = ort_stream(graph.path, positions, small=small)
        return self.stream, Limits(positions, len(self.run.model.tokenizer), self.settings.batch_size)


def _read(kind: type[T], path: Path) -> T | None:
    """What was kept; a damaged file is asked anew."""
    try:
        return from_json(kind, read_sealed(path, "", ""), "", "")
    except InputError:
        return None


def _assembled(
    run: Run,
    graphs: Sequence[_Graph],
    tasks: Sequence[EvalTask],
    questions: Sequence[Sequence[Question]],
    settings: EvalSettings,
    answers: Mapping[str, _Answered],
) -> Evaluation:
    from nbl_export.evaluate.results import Means, gate, mean_of, retrieval_result, task_result
    from nbl_export.report.assemble import created
    from nbl_export.report.evaluation import Evaluation
    from nbl_export.report.schema import environment

    base, linearized = (answers[g.role] for g in graphs)
    pairs: dict[str, Paired] = {}
    task_results, retrieval_results, choices = [], [], []
    for task in tasks:
        result, pair = task_result(task, base.tasks[task.name], linearized.tasks[task.name])
        task_results.append(result)
        if pair:
            pairs[task.name] = pair
    for asked in questions:
        own = (side.retrieval[asked[0].context] for side in (base, linearized))
        found, choice = retrieval_result(asked, *own)
        retrieval_results.append(found)
        choices.append(choice)
    return Evaluation(
        created=created(),
        tool_version=__version__,
        model=run.model.source.identity,
        environment=environment(),
        settings=settings,
        hashes={g.role: g.digest for g in graphs},
        tasks=tuple(task_results),
        retrieval=tuple(retrieval_results),
        mean=Means(mean_of(list(pairs.values())), mean_of(choices)),
        checks=tuple(
            gate(settings.min_recovery, pairs, choices, [t.name for t in tasks if t.name not in pairs])
        ),
        notes=(),
    )
