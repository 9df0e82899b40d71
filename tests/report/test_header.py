"""Values with checks come back from their file, or are refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from nbl_export.checks import Check, load_judged
from nbl_export.errors import InputError


@dataclass(frozen=True)
class Judged:
    name: str
    checks: list[Check]


CHECKS = [Check("parity", "passed", "1e-6"), Check("speed", "skipped", "no GPU")]


def written(path: Path, **changes: Any) -> Path:
    raw = {
        "schema": "judged/1",
        "verdict": "passed",
        "name": "a",
        "checks": [asdict(c) for c in CHECKS],
        **changes,
    }
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return path


def load(path: Path) -> Judged:
    return load_judged(Judged, path, "judgement", "judged/1", "judge again")


def test_a_value_comes_back_with_its_checks(tmp_path: Path) -> None:
    # Its schema and its verdict follow from the rest.
    assert load(written(tmp_path / "x.json")) == Judged("a", CHECKS)


@pytest.mark.parametrize("schema", ["judged/2", None, 1])
def test_another_schema_is_another_version(tmp_path: Path, schema: Any) -> None:
    path = written(tmp_path / "x.json", schema=schema)
    with pytest.raises(
        InputError, match=r"x\.json is no judgement of this version \(judged/1\): judge again\.$"
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
