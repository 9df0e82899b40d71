"""What is asked of the stages that measure: every bound, one value on each side of it."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.models.tasks import task_named
from nbl_export.settings import (
    NO_BOUND,
    NO_BUDGET,
    BenchSettings,
    Budget,
    EngineSettings,
    EvalSettings,
    LossBound,
    RunSettings,
    SelectSettings,
    Settings,
    VerifySettings,
)
from nbl_export.settings.definition import settings_of


@pytest.mark.parametrize(
    ("kind", "name", "good", "bad", "said"),
    [
        (VerifySettings, "decode_steps", 1, 0, "--decode-steps is 0; it must be at least 1."),
        (VerifySettings, "contexts", (2,), (2, 1), "--contexts needs lengths of at least 2 tokens."),
        (VerifySettings, "contexts", (2, 2), (), "--contexts needs lengths of at least 2 tokens."),
        (VerifySettings, "rounds", 3, 2, "--rounds is 2; at least 3 are needed for a spread."),
        (EvalSettings, "limit", 1, 0, "--limit is 0; it must be at least 1."),
        (EvalSettings, "few_shot", 0, -1, "--few-shot is -1; it must be at least 0."),
        (EvalSettings, "batch_size", 1, 0, "--batch-size is 0; it must be at least 1."),
        (
            EvalSettings,
            "retrieval_contexts",
            (2,),
            (1,),
            "--retrieval-contexts needs lengths of at least 2 tokens.",
        ),
        (
            EvalSettings,
            "retrieval_contexts",
            None,
            (),
            "--retrieval-contexts needs lengths of at least 2 tokens.",
        ),
        (EvalSettings, "retrieval_samples", 1, 0, "--retrieval-samples is 0; it must be at least 1."),
        (EvalSettings, "min_recovery", 0.0, -0.5, "--min-recovery is -0.5; give percent, between 0 and 200."),
        (
            EvalSettings,
            "min_recovery",
            200.0,
            200.5,
            "--min-recovery is 200.5; give percent, between 0 and 200.",
        ),
        (EvalSettings, "min_recovery", 97.0, nan, "--min-recovery is nan; give percent, between 0 and 200."),
        (BenchSettings, "batches", (1,), (4, 0), "--batches needs numbers of rows, at least 1."),
        (BenchSettings, "batches", (1, 2), (), "--batches needs numbers of rows, at least 1."),
        (BenchSettings, "contexts", (2,), (1,), "--contexts needs lengths of at least 2 tokens."),
        (BenchSettings, "rounds", 3, 2, "--rounds is 2; at least 3 are needed for a spread."),
        (BenchSettings, "seconds", 0.1, 0.0, "--seconds is 0; it must be more than 0."),
        (
            BenchSettings,
            "peers",
            ("eager", "dropped"),
            ("eager", "jax"),
            "--peer 'jax' is unknown; choose one of",
        ),
        (BenchSettings, "device", "cuda", "tpu", "--device 'tpu' is unknown; choose one of cpu, cuda."),
    ],
)
def test_bounds(kind: type[Settings], name: str, good: Any, bad: Any, said: str) -> None:
    kind(**{name: good}).check()
    with pytest.raises(InputError) as refused:
        kind(**{name: bad}).check()
    assert str(refused.value).startswith(said)


def test_something_must_be_evaluated() -> None:
    with pytest.raises(InputError, match="Nothing to evaluate: name --tasks, or leave out --no-retrieval"):
        EvalSettings(retrieval=False).check()
    EvalSettings(("a",), retrieval=False).check()
    EvalSettings().check()


def test_a_file_names_no_task_that_may_run_code() -> None:
    """The user may, on the command line; a file that came with a model may not."""
    (tasks,) = (one for one in settings_of(EvalSettings) if one.key == "tasks")
    for name in ("mine.yaml", "MINE.YML"):
        EvalSettings((name,)).check()
        with pytest.raises(InputError, match=rf"tasks names {name}, which may run code"):
            tasks.from_file(["arc_easy", name], "[eval] tasks")
    assert tasks.from_file(["yaml", "rows.jsonl"], "[eval] tasks") == ("yaml", "rows.jsonl")


def test_what_is_not_measured_cannot_be_bounded() -> None:
    bound = LossBound(max_perplexity_ratio=1.05)
    VerifySettings(bound=bound).check()
    VerifySettings(quality=False, bound=NO_BOUND).check()
    with pytest.raises(InputError, match=r"^--no-quality leaves unmeasured what --max-kl, --max-ppl-ratio"):
        VerifySettings(quality=False, bound=bound).check()
    with pytest.raises(InputError, match="--max-kl is -1; it must be 0 nats or more"):
        VerifySettings(bound=LossBound(max_kl=-1.0)).check()


def test_an_encoder_has_no_perplexity_to_bound() -> None:
    bounded = VerifySettings(bound=LossBound(max_kl=0.1))
    assert bounded.resolve(task_named("text-generation")) == bounded
    assert VerifySettings().resolve(task_named("feature-extraction")) == VerifySettings()
    with pytest.raises(
        InputError, match=r"this model is an encoder \(feature-extraction\).*leave them out\.$"
    ):
        bounded.resolve(task_named("feature-extraction"))


@pytest.mark.parametrize(
    ("selection", "own", "budget", "bound"),
    [
        # Where K is to be found, one bound is the budget and the gate.
        (SelectSettings(budget=Budget(0.1, None, 1.2)), NO_BOUND, Budget(0.1, None, 1.2), LossBound(0.1)),
        (SelectSettings(k="auto"), NO_BOUND, Budget(None, 1.1), LossBound(None, 1.1)),  # type: ignore[arg-type]
        # Where K is given, it is the gate alone.
        (SelectSettings(k=2, budget=Budget(0.1)), NO_BOUND, NO_BUDGET, LossBound(0.1)),
        (SelectSettings(layers=(1,), budget=Budget(None, 2.0)), NO_BOUND, NO_BUDGET, LossBound(None, 2.0)),
        # A bound that verify is given for itself is its own.
        (SelectSettings(budget=Budget(0.1)), LossBound(0.3), Budget(0.1), LossBound(0.3)),
        (SelectSettings(budget=Budget(0.1)), LossBound(None, 1.5), Budget(0.1), LossBound(0.1, 1.5)),
        (SelectSettings(k=2), NO_BOUND, NO_BUDGET, NO_BOUND),
    ],
)
def test_one_bound_serves_the_choice_and_the_verdict(
    selection: SelectSettings, own: LossBound, budget: Budget, bound: LossBound
) -> None:
    found = RunSettings(selection, verification=VerifySettings(bound=own)).sharing_bounds()
    assert (found.selection.budget, found.verification.bound) == (budget, bound)
    found.check()


def test_k_and_a_speedup_still_contradict() -> None:
    asked = RunSettings(SelectSettings(k=2, budget=Budget(0.1, None, 1.2))).sharing_bounds()
    with pytest.raises(InputError, match="give one of them"):
        asked.check()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (EvalSettings(), "Tasks and retrieval are asked of decoders"),
        (BenchSettings(), "A bench times prefill and decode"),
        (EngineSettings(), "TensorRT engines are built of decoders only"),
    ],
)
def test_what_is_of_decoders_alone(asked: Any, words: str) -> None:
    with pytest.raises(InputError, match=rf"{words}; this model is an encoder \(feature-extraction\)"):
        asked.resolve(task_named("feature-extraction"))
    assert asked.resolve(task_named("text-generation")) == asked
