"""Values with checks come back from their file, or are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.models.source import ModelIdentity
from nbl_export.report.environment import environment
from nbl_export.report.header import Header, load_judged


@dataclass(frozen=True)
class Judged(Header):
    SCHEMA = "judged/2"

    settings: Mapping[str, Any]
    name: str


CHECKS = (Check("parity", "passed", "1e-6"), Check("speed", "skipped", "no GPU"))
IDENTITY = ModelIdentity("a/model", "folder", None, "0" * 64)


def judged(*checks: Check) -> Judged:
    return Judged(
        "now", "1.0", IDENTITY, environment(), {"rounds": 3}, {"plan": "1"}, checks, ("a note",), "a"
    )


def written(path: Path, **changes: Any) -> Path:
    raw = {**judged(*CHECKS).as_json(), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return path


def load(path: Path) -> Judged:
    older = {
        "judged/1": lambda raw: {"name": raw["called"], **{k: v for k, v in raw.items() if k != "called"}}
    }
    return load_judged(Judged, path, "judgement", "judge again", older)


def test_a_value_comes_back_with_its_checks(tmp_path: Path) -> None:
    # Its schema and its verdict follow from the rest.
    assert load(written(tmp_path / "x.json")) == judged(*CHECKS)


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (("passed", "skipped"), "passed"),
        (("passed", "failed"), "failed"),
        (("skipped",), "failed"),
        ((), "failed"),
    ],
    ids=["nothing failed", "one failed", "nothing ran", "no checks"],
)
def test_a_verdict_needs_a_check_that_passed_and_none_that_failed(states: Any, verdict: str) -> None:
    assert judged(*(Check(state, state, "") for state in states)).as_json()["verdict"] == verdict


def test_an_older_schema_is_made_the_current_one(tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", schema="judged/1", name=None, called="a")
    assert load(path) == judged(*CHECKS)
    with pytest.raises(InputError, match=r"x\.json is damaged \('called'\): judge again\.$"):
        load(written(tmp_path / "x.json", schema="judged/1", name=None))


@pytest.mark.parametrize("schema", ["judged/3", None, 1])
def test_another_schema_is_another_version(tmp_path: Path, schema: Any) -> None:
    path = written(tmp_path / "x.json", schema=schema)
    with pytest.raises(
        InputError, match=r"x\.json is no judgement of this version \(judged/2\): judge again\.$"
    ):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [{"checks": None}, {"checks": 3}, {"checks": [{"name": "parity"}]}, {"name": None}, {"more": 1}],
    ids=["no checks", "checks that are none", "half a check", "a field less", "a field more"],
)
def test_what_does_not_fit_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = written(tmp_path / "x.json", **changes)
    with pytest.raises(InputError, match=r"x\.json is damaged \(.*\): judge again\.$") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_object_is_no_value(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="is no judgement of this version"):
        load(tmp_path / "x.json")
    with pytest.raises(InputError, match="The judgement is missing"):
        load(tmp_path / "y.json")
