"""Both models' answers → scores, recovery and verdicts: by hand, and the gate on both sides of its standard errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from nbl_export.errors import InputError
from nbl_export.evaluate.results import (
    HIDDEN,
    Answers,
    Both,
    Compared,
    Depth,
    Filler,
    Paired,
    Question,
    answer,
    ask,
    gate,
    mean_of,
    recovery,
    retrieval_result,
    task_result,
)
from nbl_export.evaluate.scoring import Pair, Scored
from nbl_export.evaluate.tasks import EvalTask, Outcome


def paired(base: float, linearized: float, count: int = 400, chance: float = 0.0) -> Paired:
    """Documents of which the first are right, as many as the scores say."""
    right = np.arange(count) / count
    return Paired.of((right < base) * 1.0, (right < linearized) * 1.0, np.full(count, chance))


def answers(rng: np.random.Generator, count: int, base: float, flips: float) -> Paired:
    """Right or wrong of two models that mostly agree."""
    own = (rng.random(count) < base).astype(float)
    flipped = rng.random(count) < flips
    return Paired.of(own, np.where(flipped, rng.random(count) < 0.3, own), np.full(count, 0.25))


def test_by_hand() -> None:
    pair = Paired.of([1, 1, 0, 1], [1, 0, 0, 1], [0.5] * 4)
    found = recovery([pair])
    assert found is not None
    # R = 2/3; l − R b = 1/3, −2/3, 0, 1/3: variance 2/9, mean base 3/4.
    assert found.value == pytest.approx(2 / 3)
    assert found.se == pytest.approx(np.sqrt(2 / 9 / 4) / 0.75)
    difference = Compared.of(pair).difference
    assert difference.value == -0.25
    assert difference.se == pytest.approx(np.std([0, -1, 0, 0], ddof=1) / 2)
    assert not pair.clear and recovery([pair], above_chance=True) is None


def test_the_error_is_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    pairs = [answers(rng, 400, 0.7, 0.2), answers(rng, 150, 0.5, 0.4)]
    draws = []
    for _ in range(4000):
        picked = [rng.integers(0, len(p.base), len(p.base)) for p in pairs]
        base = sum(p.base[i].mean() for p, i in zip(pairs, picked, strict=True))
        draws.append(sum(p.linearized[i].mean() for p, i in zip(pairs, picked, strict=True)) / base)
    found = recovery(pairs)
    assert found is not None
    assert found.se == pytest.approx(np.std(draws), rel=0.06)
    assert found.value == pytest.approx(np.mean(draws), abs=0.01)


# by hand ------------------------------------------------------------------------------------------


def test_scores_are_compared_document_by_document() -> None:
    found = Compared.of(Paired.of([1, 1, 0, 1], [1, 0, 0, 1], [0.25] * 4))
    assert (found.chance, found.agreement, found.base_above_chance) == (0.25, 0.75, True)
    assert (found.base.value, found.linearized.value, found.difference.value) == (0.75, 0.5, -0.25)
    assert found.base.se == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    assert found.recovery is not None and found.recovery.value == pytest.approx(2 / 3)
    # (0.5 - 0.25) / (0.75 - 0.25)
    assert found.above_chance is not None and found.above_chance.value == pytest.approx(0.5)


def outcome(acc: Sequence[float], scored: str | None = "acc", **metrics: float) -> Outcome:
    scores = {"acc": acc} if scored else {}
    return Outcome({"acc": float(np.mean(acc)), **metrics}, scores, [0.25] * len(acc), scored, len(acc))


def test_a_task_has_a_recovery_of_scores_and_both_figures_of_all() -> None:
    task = EvalTask("fruit", "fruit.jsonl", "digest", 40, None)
    base, linearized = outcome([1, 1, 0, 1], perplexity=12.0), outcome([1, 0, 0, 1], perplexity=13.0)
    result, pair = task_result(task, base, linearized)
    assert (result.name, result.source, result.digest) == ("fruit", "fruit.jsonl", "digest")
    assert (result.documents, result.total, result.scored) == (4, 40, "acc")
    assert result.figures == {"acc": Both(0.75, 0.5), "perplexity": Both(12.0, 13.0)}
    assert set(result.metrics) == {"acc"} and result.headline == result.metrics["acc"]
    assert (
        pair is not None and pair.linearized.tolist() == [1, 0, 0, 1] and pair.chance.tolist() == [0.25] * 4
    )
    bare, none = task_result(task, outcome([0.0], None), outcome([1.0], None))
    assert bare.headline is None and bare.metrics == {} and none is None


def test_retrieval_is_told_by_depth() -> None:
    golds = [0, 1, 3, 0, 1, 3]
    asked = [Question(400, 0.1, (1,), ((2,),), gold) for gold in golds]
    base = Answers((1, 1, 1, 1, 0, 1), (1, 1, 0, 1, 0, 1))
    linearized = Answers((1, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 1))
    result, pair = retrieval_result(asked, base, linearized)
    assert (result.context, result.questions) == (400, 6)
    # No question was of the third quarter.
    assert result.depths == (
        Depth("0 to 25 %", 2, 1.0, 0.5),
        Depth("25 to 50 %", 2, 0.5, 0.0),
        Depth("75 to 100 %", 2, 1.0, 0.5),
    )
    assert (result.choice.chance, result.exact.chance) == (0.25, 0.0)
    assert (result.choice.base.value, result.exact.linearized.value) == (
        pytest.approx(5 / 6),
        pytest.approx(1 / 6),
    )
    assert pair.base.tolist() == list(base.choice) and pair.linearized.tolist() == list(linearized.choice)


def test_the_mean_over_tasks_counts_each_once_and_chance_only_where_the_base_is_clear() -> None:
    good, guesses = paired(0.8, 0.6), paired(0.25, 0.2, count=4000, chance=0.25)
    found = mean_of([good, guesses])
    assert found is not None and found.recovery is not None and found.above_chance is not None
    assert (found.tasks, found.above_chance_tasks) == (2, 1)
    assert found.recovery.value == pytest.approx((0.6 + 0.2) / (0.8 + 0.25))
    assert found.above_chance.value == pytest.approx(0.6 / 0.8)
    alone = mean_of([guesses])
    assert alone is not None and alone.above_chance is None and alone.above_chance_tasks == 0
    assert mean_of([]) is None


# the gate -----------------------------------------------------------------------------------------


def test_the_gate_allows_for_the_standard_error() -> None:
    lost = {"t": paired(0.8, 0.76)}  # 95 % ± 1.2 %
    states = {m: [c.status for c in gate(m, lost, [])] for m in (90, 96, 97, 98)}
    # The mean may be one standard error below, one task of many two.
    assert states == {
        90: ["passed", "passed"],
        96: ["passed", "passed"],
        97: ["failed", "passed"],
        98: ["failed", "failed"],
    }
    assert gate(None, lost, []) == []
    (check,) = gate(95, {}, [paired(0.9, 0.3)])
    assert (check.name, check.status) == ("recovery of retrieval", "failed") and "33.3" in check.detail


def test_a_base_that_guesses_has_nothing_to_lose() -> None:
    checks = gate(99, {"guessing": paired(0.26, 0.1, chance=0.25), "good": paired(0.9, 0.9, chance=0.25)}, [])
    assert [(c.name, c.status) for c in checks[1:]] == [
        ("recovery of guessing", "failed"),
        ("recovery of good", "passed"),
    ]
    assert checks[1].detail == (
        "cannot be judged: the base model scores 26.0 %, guessing 25.0 %, so there is nothing to recover: leave it "
        "out, or ask more rows"
    )
    assert "above chance (over 1 of 2)" in checks[0].detail


@pytest.mark.parametrize(
    ("linearized", "status"), [(0.5, "failed"), (0.55, "failed"), (0.615, "passed"), (0.7, "passed")]
)
def test_a_model_that_guesses_does_not_pass_near_chance(linearized: float, status: str) -> None:
    """Of two choices: 50 of 62 percent are 81 % of the base's score, and nothing of what it knows."""
    checks = gate(80, {"t": paired(0.62, linearized, count=2000, chance=0.5)}, [])
    assert [c.status for c in checks] == [status] * 2
    plain = 100 * linearized / 0.62
    assert checks[0].detail.startswith(f"{plain:.1f} ± ")
    assert (
        f"{100 * (linearized - 0.5) / 0.12:.1f} ± " in checks[0].detail
        and "% above chance" in checks[0].detail
    )


def test_so_few_documents_that_guessing_would_pass_judge_nothing() -> None:
    few = paired(0.75, 0.5, count=20, chance=0.5)
    assert few.clear
    _, task = gate(60, {"t": few}, [])
    assert task.status == "failed" and task.detail.startswith("cannot be judged by so few documents: ")
    # A base that is clearly good is judged by few, too.
    assert [c.status for c in gate(60, {"t": paired(0.9, 0.85, count=20, chance=0.25)}, [])] == ["passed"] * 2
    # One document has no standard error, which is not one of zero.
    assert [c.status for c in gate(60, {"t": paired(1.0, 1.0, count=1)}, [])] == ["failed"] * 2
    # Of a gate of nothing anything is recovered.
    assert {c.status for c in gate(0, {"t": few}, [])} == {"passed"}


def test_a_task_that_cannot_be_judged_is_named_and_alone_is_no_pass() -> None:
    (text,) = gate(97, {}, [], ["text"])
    assert (text.name, text.status) == ("recovery of text", "skipped") and "perplexities alone" in text.detail
    checks = gate(97, {"a": paired(0.8, 0.8)}, [], ["text"])
    assert [c.status for c in checks] == ["passed", "passed", "skipped"]
    assert gate(None, {}, [], ["text"]) == []


def test_scores_that_are_no_numbers_do_not_pass() -> None:
    nan = Paired.of([1.0, 1.0, 1.0], [1.0, math.nan, 1.0], [0.0, 0.0, 0.0])
    assert {c.status for c in gate(50, {"t": nan}, [])} == {"failed"}


# retrieval -----------------------------------------------------------------------------------------

START = np.array([1], dtype=np.int32)


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.fixture
def filler() -> Filler:
    text = "It was a day like any other, and the sea was calm. " * 40
    return Filler(START, np.array(encode(text), dtype=np.int32))


def model(choose: Callable[[str], str]) -> Callable[[Sequence[Pair]], list[Scored]]:
    """A model that is sure of the code ``choose`` finds in the prompt."""

    def score(pairs: Sequence[Pair]) -> list[Scored]:
        found = [choose(decode(p.context)) == decode(p.continuation).strip() for p in pairs]
        return [Scored(-1.0 if right else -9.0, right) for right in found]

    return score


def looks_up(prompt: str) -> str:
    (door,) = re.findall(r"The code of the (\w+) door is$", prompt)
    (code,) = re.findall(rf"The code of the {door} door is (\d+)\.", prompt)
    return str(code)


def takes_the_last(prompt: str) -> str:
    return str(re.findall(r"door is (\d+)\.", prompt)[-1])


def test_who_looks_up_is_always_right(filler: Filler) -> None:
    found = answer(model(looks_up), ask(filler, encode, 1000, 40, seed=0))
    assert found.choice == found.exact == (1.0,) * 40


def test_who_only_copies_some_code_is_right_by_chance(filler: Filler) -> None:
    found = answer(model(takes_the_last), ask(filler, encode, 1000, 40, seed=0))
    # What is asked goes round the parts of the context, and the last is right in one of them.
    assert sum(found.choice) == 40 / HIDDEN and sum(found.exact) == 40 / HIDDEN
    indifferent = answer(
        lambda pairs: [Scored(-3.0, False)] * len(pairs), ask(filler, encode, 1000, 40, seed=0)
    )
    assert sum(indifferent.choice) == 40 / HIDDEN and sum(indifferent.exact) == 0


def test_questions_are_as_long_as_asked_and_hide_what_they_ask(filler: Filler) -> None:
    for question in ask(filler, encode, 700, 12, seed=3):
        text = decode(question.prompt)
        assert len(question.prompt) + max(map(len, question.answers)) == 700
        assert question.prompt[0] == 1
        codes = [decode(a).strip() for a in question.answers]
        assert len(set(codes)) == HIDDEN and re.findall(r"door is (\d+)\.", text) == codes
        assert looks_up(text) == codes[question.gold]
        at = text.index(f"is {codes[question.gold]}.") / len(text)
        assert question.gold / HIDDEN <= question.depth <= (question.gold + 1) / HIDDEN
        assert abs(at - question.depth) < 0.25
        assert "\x00" not in text and "the sea was calm" in text


def test_questions_depend_on_the_seed_alone(filler: Filler) -> None:
    def asked(seed: int, context: int = 700) -> list[Question]:
        return ask(filler, encode, context, 6, seed)

    assert asked(0) == asked(0) and asked(0) != asked(1)
    assert ask(filler, encode, 700, 3, 0) == asked(0)[:3]


def test_a_context_too_short_is_refused(filler: Filler) -> None:
    with pytest.raises(
        InputError, match=r"--retrieval-contexts has 100 tokens; .* needs \d+ at least"
    ) as refusal:
        ask(filler, encode, 100, 1, 0)
    least = int(re.findall(r"needs (\d+)", str(refusal.value))[0])
    assert len(ask(filler, encode, least, 20, 0)) == 20
    with pytest.raises(InputError):
        ask(filler, encode, least - 1, 1, 0)
