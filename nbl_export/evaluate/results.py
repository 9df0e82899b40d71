"""Hide codes in held-out text and ask for them, and compare both models' answers: scores, recovery, verdicts.

``eval.json`` has the results as they stand here (:mod:`nbl_export.report.evaluation`).

Both models answer the same documents, so the scores are paired: a document with equal scores says nothing about their
difference. With b_i and l_i the scores of document i and R = Σ l / Σ b, the delta method gives

    se(R) = sd(l − R b) / (√n · mean b)

For several tasks R is the ratio of the mean scores of the tasks (each task counts once, whatever its size), and the
variances of the tasks add. Recovery above chance subtracts the chance score from both first.

A linearized layer does not mix tokens, so it may reduce retrieval accuracy:

    start │ text … The code of the red door is 4821. … text … The code of the blue door is 1093. … text
          │ … The code of the red door is  ──►  4821 ?

Several codes are hidden, at depths spread evenly over the context, and the wrong answers are the other hidden codes, so
copying a random one is right once in :data:`HIDDEN`. Each question has two scores: *choice*, the right code is the most
likely of the hidden ones; *exact*, greedy decoding generates the right code. Both models get the same questions, which
depend only on the seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import F64, hidden_in
from nbl_export.errors import InputError
from nbl_export.evaluate.scoring import Pair, Scored, Tokens
from nbl_export.records import Check

if TYPE_CHECKING:
    from nbl_export.evaluate.tasks import EvalTask, Outcome

Encode = Callable[[str], list[int]]
HIDDEN = 4
_DOORS = ("red", "blue", "green", "white", "black", "brown", "yellow", "purple")
_DIGITS = 4
_ASKING = "The code of the {} door is"

# A base score within this many standard errors of chance gives no meaningful recovery.
_CLEAR = 2.0
# A gate fails where a recovery is below it by more standard errors than these: one for the mean, two for one
# of many tasks, as some task is always unlucky.
MEAN_ERRORS, TASK_ERRORS = 1.0, 2.0
# Of fewer documents there is no standard error.
_FEWEST = 2


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is 0 for a single document."""

    value: float
    se: float


@dataclass(frozen=True)
class Paired:
    """Scores of the same documents, [n] each, by the base and the linearized model, and of random guessing."""

    base: F64
    linearized: F64
    chance: F64

    @classmethod
    def of(cls, base: Sequence[Any], linearized: Sequence[Any], chance: Sequence[Any]) -> Paired:
        """From lists."""
        return cls(*(np.asarray(v, dtype=np.float64) for v in (base, linearized, chance)))

    @property
    def clear(self) -> bool:
        """Whether the base model is better than chance by two standard errors."""
        over = mean(self.base - self.chance)
        return over.value > 0 and over.value >= _CLEAR * over.se


def mean(values: F64) -> Estimate:
    """Mean of documents' scores [n] and its standard error."""
    count = len(values)
    se = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Estimate(float(values.mean()), se)


def recovery(tasks: Sequence[Paired], above_chance: bool = False) -> Estimate | None:
    """Ratio of the linearized model's mean score to the base's; None if the base's is 0.

    ``above_chance`` subtracts chance from both scores first; it gives None if the base is not clearly above chance.
    """
    if not tasks or (above_chance and not all(t.clear for t in tasks)):
        return None
    pairs = [
        (t.base - t.chance, t.linearized - t.chance) if above_chance else (t.base, t.linearized)
        for t in tasks
    ]
    base = sum(float(b.mean()) for b, _ in pairs)
    if base <= 0:
        return None
    ratio = sum(float(lin.mean()) for _, lin in pairs) / base
    variance = sum(mean(lin - ratio * b).se ** 2 for b, lin in pairs)
    return Estimate(ratio, math.sqrt(variance) / base)


@dataclass(frozen=True)
class Compared:
    """Scores of one metric, their difference and the recovery, each with its standard error.

    ``chance`` is what guessing scores; ``agreement`` the share of documents on which both score the same. A recovery is
    None where there is nothing to divide by, or where the base is not clearly above chance (``base_above_chance``).
    """

    chance: float
    base: Estimate
    linearized: Estimate
    difference: Estimate
    agreement: float
    recovery: Estimate | None
    above_chance: Estimate | None
    base_above_chance: bool

    @classmethod
    def of(cls, pair: Paired) -> Compared:
        return cls(
            chance=float(pair.chance.mean()),
            base=mean(pair.base),
            linearized=mean(pair.linearized),
            difference=mean(pair.linearized - pair.base),
            agreement=float(np.mean(pair.base == pair.linearized)),
            recovery=recovery([pair]),
            above_chance=recovery([pair], above_chance=True),
            base_above_chance=pair.clear,
        )


@dataclass(frozen=True)
class Both:
    """One figure of both graphs."""

    base: float
    linearized: float


@dataclass(frozen=True)
class TaskResult:
    """One task: ``documents`` of ``total`` were asked; ``metrics`` by name those of which a recovery can be stated.

    ``scored`` names the one whose recovery counts, None if there is none; ``figures`` are the harness's own.
    """

    name: str
    source: str
    digest: str
    documents: int
    total: int
    scored: str | None
    metrics: Mapping[str, Compared]
    figures: Mapping[str, Both]

    @property
    def headline(self) -> Compared | None:
        """The metric whose recovery counts."""
        return self.metrics[self.scored] if self.scored else None


@dataclass(frozen=True)
class Depth:
    """The questions whose code stands at one ``depth`` of the text, and the share that each graph chose right."""

    depth: str
    questions: int
    base: float
    linearized: float


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieval at one context length: by choice among the hidden codes, and by greedy decoding (``exact``)."""

    context: int
    questions: int
    choice: Compared
    exact: Compared
    depths: tuple[Depth, ...]


@dataclass(frozen=True)
class MeanRecovery:
    """Recovery of the mean over ``tasks``; above chance over the ``above_chance_tasks`` whose base is clearly so."""

    tasks: int
    recovery: Estimate | None
    above_chance: Estimate | None
    above_chance_tasks: int


@dataclass(frozen=True)
class Means:
    """Over all tasks and over all context lengths; None where there are none."""

    tasks: MeanRecovery | None = None
    retrieval: MeanRecovery | None = None


def mean_of(pairs: Sequence[Paired]) -> MeanRecovery | None:
    """Recovery of the mean over tasks; None where there are none."""
    if not pairs:
        return None
    clear = [p for p in pairs if p.clear]
    return MeanRecovery(len(pairs), recovery(pairs), recovery(clear, above_chance=True), len(clear))


def task_result(task: EvalTask, base: Outcome, linearized: Outcome) -> tuple[TaskResult, Paired | None]:
    """What both graphs answered to a task, and the paired scores whose recovery counts."""
    pairs = {
        name: Paired.of(scores, linearized.scores[name], base.chance) for name, scores in base.scores.items()
    }
    result = TaskResult(
        name=task.name,
        source=task.source,
        digest=task.digest,
        documents=base.documents,
        total=task.total,
        scored=base.scored,
        metrics={name: Compared.of(pair) for name, pair in pairs.items()},
        figures={name: Both(value, linearized.metrics[name]) for name, value in base.metrics.items()},
    )
    return result, pairs.get(base.scored or "")


def retrieval_result(
    asked: Sequence[Question], base: Answers, linearized: Answers
) -> tuple[RetrievalResult, Paired]:
    """What both graphs answered at a context length, and the paired choices whose recovery counts."""
    count = len(asked)
    choice = Paired.of(base.choice, linearized.choice, [1 / HIDDEN] * count)
    exact = Paired.of(base.exact, linearized.exact, [0.0] * count)
    depths = []
    for part in range(HIDDEN):
        # The codes stand in the order of the parts.
        if inside := [i for i, q in enumerate(asked) if q.gold == part]:
            shares = (float(side[inside].mean()) for side in (choice.base, choice.linearized))
            where = f"{100 * part // HIDDEN} to {100 * (part + 1) // HIDDEN} %"
            depths.append(Depth(where, len(inside), *shares))
    context = asked[0].context
    result = RetrievalResult(context, count, Compared.of(choice), Compared.of(exact), tuple(depths))
    return result, choice


def gate(
    minimum: float | None,
    tasks: Mapping[str, Paired],
    retrieval: Sequence[Paired],
    unscored: Sequence[str] = (),
) -> list[Check]:
    """The verdicts of ``--min-recovery`` (in percent): on the mean, on each task, and on retrieval.

    ``unscored`` are the tasks of which no recovery can be stated: they are named, and alone they are no pass.

    Recovery is judged as it is and above chance: near chance, the first hardly falls. What cannot be judged, because
    the base model hardly does better than guessing or because of too few documents, has failed.
    """
    if minimum is None:
        return []
    checks = []
    if tasks:
        checks.append(_check("mean recovery", list(tasks.values()), minimum, MEAN_ERRORS))
        checks += [_check(f"recovery of {name}", [p], minimum, TASK_ERRORS) for name, p in tasks.items()]
    if retrieval:
        checks.append(_check("recovery of retrieval", retrieval, minimum, TASK_ERRORS))
    why = "it has perplexities alone, of which there is no recovery"
    return checks + [Check(f"recovery of {name}", "skipped", why) for name in unscored]


def _check(name: str, pairs: Sequence[Paired], minimum: float, errors: float) -> Check:
    clear = [p for p in pairs if p.clear]
    found, above = recovery(pairs), recovery(clear, above_chance=True)
    if found is None or above is None:
        base, chance = (
            100 * float(np.mean([getattr(p, of).mean() for p in pairs])) for of in ("base", "chance")
        )
        return Check(
            name,
            "failed",
            f"cannot be judged: the base model scores {base:.1f} %, guessing {chance:.1f} %, so there is nothing to "
            "recover: leave it out, or ask more rows",
        )
    said = [("", found)] + ([(" above chance", above)] if any(p.chance.any() for p in pairs) else [])
    of = f" (over {len(clear)} of {len(pairs)})" if len(clear) < len(pairs) else ""
    parts = [f"{100 * r.value:.1f} ± {100 * r.se:.1f} %{what}{of if what else ''}" for what, r in said]
    detail = f"{', '.join(parts)}, gate {minimum:g} % less {errors:g} standard error{'s' * (errors != 1)}"
    # With errors as large as that, a model that only guesses would pass.
    blind = minimum > 0 and any(100 * errors * r.se >= minimum for _, r in said)
    if blind or any(len(p.base) < _FEWEST for p in pairs):
        return Check(
            name, "failed", f"cannot be judged by so few documents: {detail}: ask more rows, or leave it out"
        )
    kept = all(100 * (r.value + errors * r.se) >= minimum for _, r in said)
    return Check(name, "passed" if kept else "failed", detail)


# retrieval -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A prompt, the hidden codes as continuations, and the index of the right one.

    ``depth`` is the position of the right one: 0 at the start of the text, 1 at its end.
    """

    context: int
    depth: float
    prompt: Tokens
    answers: tuple[Tokens, ...]
    gold: int


@dataclass(frozen=True)
class Filler:
    """The text around the codes: ``start`` [n], the first tokens of a prompt, and ``text`` [tokens]."""

    start: NDArray[np.int32]
    text: NDArray[np.int32]


def ask(filler: Filler, encode: Encode, context: int, count: int, seed: int) -> list[Question]:
    """``count`` questions of exactly ``context`` tokens, including the longest answer.

    The depth of the right code cycles through the :data:`HIDDEN` sections of the context. Raises :class:`InputError`
    for a context that is too short for the sentences and as much text.
    """
    if context < (least := least_context(filler, encode)):
        raise InputError(
            f"--retrieval-contexts has {context} tokens; this model's tokenizer needs {least} at least to hide "
            f"{HIDDEN} sentences in text."
        )
    rng = random.Random(f"{seed}:{context}")
    return [_question(filler, encode, context, i % HIDDEN, rng) for i in range(count)]


def least_context(filler: Filler, encode: Encode) -> int:
    """The minimum context: the hidden sentences and the question, with the longest names, and as much text."""
    sentence = max(len(encode(f"\n{_ASKING.format(door)} {10**_DIGITS - 1}.\n")) for door in _DOORS)
    return 2 * ((HIDDEN + 1) * sentence + len(filler.start))


def _question(filler: Filler, encode: Encode, context: int, gold: int, rng: random.Random) -> Question:
    doors = rng.sample(_DOORS, HIDDEN)
    codes = [str(c) for c in rng.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), HIDDEN)]
    hidden = [encode(f"\n{_ASKING.format(door)} {code}.\n") for door, code in zip(doors, codes, strict=True)]
    question = encode(f"\n{_ASKING.format(doors[gold])}")
    answers = tuple(
        tuple(encode(f"\n{_ASKING.format(doors[gold])} {code}")[len(question) :]) for code in codes
    )
    fixed = sum(map(len, hidden)) + len(question) + max(map(len, answers)) + len(filler.start)
    room = context - fixed
    begin = rng.randrange(len(filler.text))
    text = np.take(filler.text, np.arange(begin, begin + room), mode="wrap").tolist()
    filled, offsets = hidden_in(text, hidden, rng)
    prompt = (*filler.start.tolist(), *filled, *question)
    return Question(context, offsets[gold] / room, prompt, answers, gold)


@dataclass(frozen=True)
class Answers:
    """For each question: whether the right code is the most likely one, and whether greedy decoding generates it."""

    choice: tuple[float, ...]
    exact: tuple[float, ...]


def answer(score: Callable[[Sequence[Pair]], Sequence[Scored]], questions: Sequence[Question]) -> Answers:
    """Answer the questions with ``score``, :func:`~nbl_export.evaluate.scoring.log_likelihoods` of a model.

    Greedy decoding generates a code if each of its tokens is the most likely one after the previous tokens.
    """
    pairs = [Pair(q.prompt, a) for q in questions for a in q.answers]
    scores = list(score(pairs))
    choice, exact = [], []
    for i, question in enumerate(questions):
        own = scores[i * HIDDEN : (i + 1) * HIDDEN]
        best = max(range(HIDDEN), key=lambda j: own[j].log_likelihood)
        choice.append(float(best == question.gold))
        exact.append(float(own[question.gold].greedy))
    return Answers(tuple(choice), tuple(exact))
