"""What is asked of the stages that measure: every bound, one value on each side of it."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.settings import BenchSettings, EvalSettings, Settings, VerifySettings
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


def test_how_often_a_noisy_cell_is_repeated_is_no_option() -> None:
    assert "most" not in {one.key for one in settings_of(BenchSettings)}
    assert BenchSettings().most == 3
