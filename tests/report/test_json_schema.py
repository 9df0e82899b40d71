"""The published schemas are those of the reports, and refuse what no report is."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nbl_export.report.json_schema import FOLDER, _Shared, file_of, schema_of
from nbl_export.report.schema import Report, load_report
from scripts.json_schemas import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_what_is_written(kind: Any) -> None:
    published = json.loads(file_of(kind).read_text(encoding="utf-8"))
    assert published == schema_of(kind), "run python scripts/json_schemas.py"
    Draft202012Validator.check_schema(published)


def test_every_file_is_of_a_kind_of_report() -> None:
    assert {file_of(kind) for kind in KINDS} == set(FOLDER.iterdir())


@pytest.fixture
def real(stories_out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stories_out / "report" / "report.json").read_text())
    return found


def test_a_real_report_is_valid_and_what_is_changed_is_not(real: dict[str, Any]) -> None:
    validator = Draft202012Validator(schema_of(Report))
    validator.validate(real)

    def changed(**fields: Any) -> dict[str, Any]:
        return {**copy.deepcopy(real), **fields}

    without = {name: value for name, value in real.items() if name != "checks"}
    cells = copy.deepcopy(real)
    cells["speed"]["cells"][0]["batch"] = "one"
    layers = copy.deepcopy(real)
    layers["selection"]["candidates"][0]["layer"] = "7.attention"
    for wrong in (
        without,
        cells,
        layers,
        changed(verdict="PASS"),
        changed(schema="nbl-export/report/1"),
        changed(unknown=1),
        changed(notes="a text"),
    ):
        assert not validator.is_valid(wrong)


def test_numbers_that_json_does_not_have_are_text(stories_out: Path) -> None:
    validator = Draft202012Validator({**_Shared().of(float), "$defs": schema_of(Report)["$defs"]})
    assert all(validator.is_valid(value) for value in (1, 0.5, "nan", "inf", "-inf"))
    assert not any(validator.is_valid(value) for value in ("1", None, "infinity"))
    report = load_report(stories_out / "report" / "report.json")
    assert report.as_json()["schema"] == "nbl-export/report/2"


def test_a_type_that_no_report_has_and_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="has no schema"):
        _Shared().of(bytes)

    def made() -> Any:
        @dataclass
        class Same:
            x: int

        return Same

    shared = _Shared()
    first, second = made(), made()
    assert shared.of(first) == shared.of(first) == {"$ref": "#/$defs/Same"}
    with pytest.raises(TypeError, match="have one name"):
        shared.of(second)
