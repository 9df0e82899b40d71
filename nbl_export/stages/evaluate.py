"""Both graphs + tasks → ``report/eval.json``: scores, recovery, and what looking up costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.batch import words
from nbl_export.calibrate.text import load_text
from nbl_export.errors import InputError
from nbl_export.evaluate.results import (
    HIDDEN,
    Answers,
    Filler,
    Means,
    Question,
    answer,
    ask,
    gate,
    least_context,
    mean_of,
    retrieval_result,
    task_result,
)
from nbl_export.evaluate.scoring import Limits, log_likelihoods
from nbl_export.evaluate.tasks import EvalTask, Outcome, check_tasks, find_tasks, run_task
from nbl_export.files import read_sealed, sha256_of_json, write_sealed
from nbl_export.models.folder import task_named
from nbl_export.models.source import ModelSource
from nbl_export.progress import Listener
from nbl_export.records import MODEL, SIDECARS, StageRecord, from_json, to_json
from nbl_export.report.assemble import created
from nbl_export.report.evaluation import Evaluation, load_evaluation, write_evaluation
from nbl_export.report.schema import environment
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.session import fit, require_onnxruntime, session_bytes
from nbl_export.settings import EvalSettings
from nbl_export.settings.choices import RETRIEVAL_CONTEXTS
from nbl_export.stages.run import (
    Run,
    check_baseline,
    current_rewrite,
    graphs_on,
    graphs_setting,
    model_positions,
    opened,
)
from nbl_export.workspace import Workspace

# What a kept answer is worth depends on how it was asked; a change there makes this another number.
_ASKED = 1
# A context for a model whose configuration sets no bound: what the longest default question needs, doubled.
_UNBOUNDED = 2048


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
    with opened(out, settings, listener, trust_remote_code, rehash, _check) as (run, asked):
        require_onnxruntime()
        ws, source = run.workspace, run.model.source
        check_baseline(ws)
        rewritten, exported = current_rewrite(ws), ws.require("export")
        base = _files(ws, ws.baseline, exported)
        # The linearized graph reads the data of the other.
        shared = {name: digest for name, digest in base.items() if not name.endswith(ws.baseline.name)}
        linearized = _files(ws, ws.model, rewritten) | shared
        hashes = {"base": sha256_of_json(base), "linearized": sha256_of_json(linearized)}
        if asked.chat_template and not run.model.tokenizer.chat_template:
            raise InputError("This model's tokenizer has no chat template: leave out --chat-template.")
        positions = model_positions(ws)
        questions = _questions(run, asked, positions) if asked.retrieval else []
        tasks = find_tasks(asked.tasks, asked) if asked.tasks else []
        # The text of calibration is what retrieval hides its answers in.
        made_of = {
            MODEL: source.model,
            SIDECARS: source.sidecars,
            "rewrite": rewritten.result,
            "calibrate": ws.require("calibrate").result,
            "tasks": sha256_of_json([t.digest for t in tasks]),
            "positions": str(positions),
        }
        device = run.on(asked.device)
        where = graphs_setting(device)
        with run.stage("eval", asked.as_json() | where, made_of, device) as work:
            if work:
                with graphs_on(device, work):
                    common = {
                        "model": [source.model, source.sidecars],
                        "version": _ASKED,
                        "positions": positions,
                        **where,
                    }
                    answers = [
                        _answers(
                            run,
                            asked,
                            role,
                            common | {"graph": digest},
                            [*tasks, *questions],
                            positions,
                            work,
                        )
                        for role, digest in hashes.items()
                    ]
                if kept := sum(count for _, count in answers):
                    work.note(f"eval: {kept} of {2 * len(answers[0][0])} results kept from before.")
                pairs = list(zip(*(values for values, _ in answers), strict=True))
                work.files = write_evaluation(
                    ws.report, _compared(run, hashes, tasks, questions, asked, pairs)
                )
        return load_evaluation(ws.report / "eval.json")


def _check(source: ModelSource, settings: EvalSettings) -> None:
    if task_named(source.task).causal:
        check_tasks(settings.tasks)


def _files(ws: Workspace, graph: Path, record: StageRecord) -> dict[str, str]:
    """The digests of a graph and its data files; what lies beside them is for consumers."""
    prefix = graph.relative_to(ws.root).as_posix()
    return {name: digest for name, digest in record.files.items() if name.startswith(prefix)}


def _answers(
    run: Run,
    settings: EvalSettings,
    role: str,
    common: Mapping[str, Any],
    asked: Sequence[EvalTask | list[Question]],
    positions: int | None,
    listener: Listener,
) -> tuple[list[Any], int]:
    """What one graph answers to each task and to the questions of each length, and how many were kept."""
    ws, tokenizer, most = run.workspace, run.model.tokenizer, positions or _UNBOUNDED
    graph, limits = (
        ws.baseline if role == "base" else ws.model,
        Limits(most, len(tokenizer), settings.batch_size),
    )
    stream: Any = None  # one graph is in memory at a time, and none if nothing is asked of it
    values, kept = [], 0
    for one in asked:
        kind = Answers if isinstance(one, list) else Outcome
        digest = sha256_of_json([asdict(q) for q in one]) if isinstance(one, list) else one.digest
        file = ws.evaluations / f"{sha256_of_json({**common, 'asked': digest})[:32]}.json"
        value: Any = None
        with suppress(InputError):  # a damaged file is asked anew
            value = from_json(kind, read_sealed(file, "", ""), "", "")  # type: ignore[arg-type]
        kept += value is not None
        if value is None:
            # A small session is slower: in half precision it converts its weights in each pass.
            stream = stream or ort_stream(graph, most, small=not fit(session_bytes(graph)))
            if isinstance(one, list):
                title = f"{role}: {one[0].context} tokens"
                with listener.task(title, len(one) * HIDDEN, "answers") as progress:
                    score = partial(log_likelihoods, stream, limits=limits, advance=progress.advance)
                    value = answer(score, one)
            else:
                from nbl_export.evaluate.harness import DecoderLM  # needs lm-eval, which retrieval does not

                lm = DecoderLM(stream, tokenizer, limits, listener, f"{role}: {one.name}")
                value = run_task(lm, one, settings)
            write_sealed(file, to_json(value))
        values.append(value)
    return values, kept


def _questions(run: Run, settings: EvalSettings, positions: int | None) -> list[list[Question]]:
    """The questions of each context length; lengths asked for that the model cannot have are refused."""
    text, tokenizer = load_text(run.workspace.text), run.model.tokenizer
    filler = Filler(text.start, words(text.heldout).reshape(-1))

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


def _compared(
    run: Run,
    hashes: Mapping[str, str],
    tasks: Sequence[EvalTask],
    questions: Sequence[Sequence[Question]],
    settings: EvalSettings,
    answers: Sequence[tuple[Any, Any]],
) -> Evaluation:
    """What both graphs answered, to the tasks and then to the questions, as scores and verdicts."""
    of_tasks, of_questions = answers[: len(tasks)], answers[len(tasks) :]
    results = [task_result(task, *both) for task, both in zip(tasks, of_tasks, strict=True)]
    pairs = {result.name: pair for result, pair in results if pair}
    found = [retrieval_result(same, *both) for same, both in zip(questions, of_questions, strict=True)]
    choices = [choice for _, choice in found]
    unscored = [result.name for result, pair in results if not pair]
    return Evaluation(
        created=created(),
        tool_version=__version__,
        model=run.model.source.identity,
        environment=environment(),
        settings=settings,
        hashes=hashes,
        tasks=tuple(result for result, _ in results),
        retrieval=tuple(result for result, _ in found),
        mean=Means(mean_of(list(pairs.values())), mean_of(choices)),
        checks=tuple(gate(settings.min_recovery, pairs, choices, unscored)),
        notes=(),
    )
