"""The key of a stage: every input is in it, and what was made of other inputs says which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbl_export.stage_record import MODEL, SIDECARS, STAGES, StageRecord, key_of, stale


def record(stage: str, settings: dict[str, int], made_of: dict[str, str], content: str = "x") -> StageRecord:
    key = key_of(stage, settings, made_of)
    return StageRecord(key, settings, {"file": content}, 1.0, (), made_of, STAGES[stage])


def test_the_key_is_of_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        key_of("select", {"k": 2}, {"calibrate": "a"}),
        key_of("export", {"k": 2}, {"calibrate": "a"}),
        key_of("select", {"k": 3}, {"calibrate": "a"}),
        key_of("select", {"k": 2}, {"calibrate": "b"}),
        key_of("select", {"k": 2}, {"calibrate": "a", "export": "c"}),
    }
    monkeypatch.setitem(STAGES, "select", STAGES["select"] + 1)
    assert len({*keys, key_of("select", {"k": 2}, {"calibrate": "a"})}) == 6


def test_a_tuple_and_the_list_that_json_makes_of_it_are_one_setting() -> None:
    assert key_of("select", {"layers": (1, 2)}, {}) == key_of("select", {"layers": [1, 2]}, {})


def test_the_result_is_of_the_key_and_of_the_files() -> None:
    one = record("calibrate", {}, {})
    results = {one.result, record("calibrate", {"a": 1}, {}).result, record("calibrate", {}, {}, "y").result}
    assert len(results) == 3
    # How long it took and what it said is no part of it.
    assert replace(one, seconds=2.0, notes=("a",)).result == one.result


@pytest.mark.parametrize(
    ("settings", "made_of", "words"),
    [
        ({"k": 3}, {MODEL: "m"}, "it was made with another k"),
        ({"k": 2, "rank": 4}, {MODEL: "m"}, "it was made with another rank"),
        ({"k": 2}, {MODEL: "n"}, "the model's tokenizer, code or other files have changed"),
        (
            {"k": 2},
            {MODEL: "m", SIDECARS: "s"},
            "the model's generation configuration or chat template has changed",
        ),
        ({"k": 2}, {MODEL: "m", "export": "e"}, "`export` was done again"),
        ({"k": 2}, {MODEL: "m", "text": "t"}, "its text changed"),
        ({"k": 2}, {MODEL: "m"}, None),
    ],
)
def test_which_input_is_another_is_said(
    settings: dict[str, int], made_of: dict[str, str], words: str | None
) -> None:
    assert record("select", {"k": 2}, {MODEL: "m"}).other_inputs("select", settings, made_of) == words


def test_a_record_that_names_a_stage_which_is_not_there() -> None:
    """An empty result, which no stage has, is no way around it."""
    select = record("select", {}, {"calibrate": ""})
    assert stale({"select": select}, "select", {}) == "`calibrate` was done again"


def test_a_stage_without_the_one_above_it_is_stale() -> None:
    below = record("select", {}, {"calibrate": "gone"})
    assert stale({"select": below}, "select", {}) == "`calibrate` was done again"
