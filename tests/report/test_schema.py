"""The report as a value and as JSON: nothing is lost, nothing is let through, the verdict is strict."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.files import jsonable, write_json
from nbl_export.report.schema import Report, load_report
from nbl_export.verify.parity.figures import DecoderParity


def strictly(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are no numbers."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_round_trip(report: Report, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report.as_json())
    again = load_report(tmp_path / "report.json")
    assert again == report
    assert all(isinstance(c, Check) for c in again.checks)
    raw = strictly((tmp_path / "report.json").read_text())
    assert raw["schema"] == Report.SCHEMA == "nbl-export/report/2"
    assert set(raw) == {"schema", "verdict", *(f.name for f in fields(Report))}


def test_a_real_report_says_what_was_done(report: Report, stories_out: Path) -> None:
    assert report.passed and report.divergence is None
    assert report.selection.layers == (2, 3) and len(report.selection.candidates) == 5
    assert report.graph.before.kv_pairs - report.graph.after.kv_pairs == 2
    assert report.graph.kv_layers == (0, 1, 4)
    assert isinstance(report.parity, DecoderParity)
    assert [s.step for s in report.parity.steps] == list(range(9))
    assert set(report.stage_seconds) == {"calibrate", "select", "export", "rewrite"}
    assert {"model", "model.onnx", "baseline/model.onnx", "nbl/plan.json"} <= set(report.hashes)
    # Nothing in it names the machine's folders: the model by its source, files relative to the output.
    assert "path" not in report.as_json()["model"]
    assert not any(name.startswith("/") for name in report.hashes)


def test_reading_a_report_imports_nothing_heavy() -> None:
    """Sections are values of the rooms that measure them, whose libraries a reader does not need."""
    heavy = ("torch", "numpy", "scipy", "onnx_ir", "onnxruntime", "transformers", "matplotlib")
    code = f"import sys, nbl_export.report.schema; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PASSED, FAILED, SKIPPED = (Check(s, s, "") for s in ("passed", "failed", "skipped"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([PASSED], True),
        ([PASSED, SKIPPED], True),
        ([PASSED, FAILED], False),
        ([FAILED], False),
        ([PASSED, PASSED, FAILED, SKIPPED], False),
        ([SKIPPED], False),
        ([SKIPPED, SKIPPED], False),
        ([], False),
    ],
    ids=lambda value: "+".join(c.status for c in value) if isinstance(value, list) else str(value),
)
def test_verdict(report: Report, checks: list[Check], verdict: bool) -> None:
    changed = replace(report, checks=checks)
    assert changed.passed is verdict
    assert changed.as_json()["verdict"] == ("passed" if verdict else "failed")


def test_a_written_verdict_is_not_believed(report: Report, tmp_path: Path) -> None:
    raw = replace(report, checks=[FAILED]).as_json() | {"verdict": "passed"}
    write_json(tmp_path / "report.json", raw)
    assert not load_report(tmp_path / "report.json").passed


def test_jsonable_turns_what_json_lacks_into_words() -> None:
    value = {
        "a": float("nan"),
        "b": (float("inf"), -float("inf"), 1.5),
        3: [{"c": float("nan")}],
        "d": None,
        "e": True,
        "f": "nan",
    }
    assert jsonable(value) == {
        "a": "nan",
        "b": ["inf", "-inf", 1.5],
        "3": [{"c": "nan"}],
        "d": None,
        "e": True,
        "f": "nan",
    }


def test_a_report_with_nan_and_inf_is_strict_json(report: Report, tmp_path: Path) -> None:
    assert isinstance(report.parity, DecoderParity)
    steps = list(report.parity.steps)
    steps[2] = replace(steps[2], max_abs=float("nan"), kv_max_rel=float("inf"))
    broken = replace(report, parity=replace(report.parity, steps=tuple(steps)))
    write_json(tmp_path / "report.json", broken.as_json())
    raw = strictly((tmp_path / "report.json").read_text())
    assert (raw["parity"]["steps"][2]["max_abs"], raw["parity"]["steps"][2]["kv_max_rel"]) == ("nan", "inf")
    again = load_report(tmp_path / "report.json").parity
    assert isinstance(again, DecoderParity)
    assert math.isnan(again.steps[2].max_abs) and again.steps[2].kv_max_rel == math.inf


# refusals ----------------------------------------------------------------------------------------


def damaged(report: Report, how: str) -> str:
    raw = report.as_json()
    if how == "another schema":
        raw["schema"] = "nbl-export/report/0"
    elif how == "no schema":
        del raw["schema"]
    elif how == "a field is missing":
        del raw["graph"]
    elif how == "no checks":
        del raw["checks"]
    elif how == "a field too many":
        raw["extra"] = 1
    elif how == "a check too wide":
        raw["checks"][0]["extra"] = 1
    elif how == "checks are no list":
        raw["checks"] = 3
    elif how == "a list":
        return json.dumps([raw])
    text = json.dumps(raw)
    return text[: len(text) // 2] if how == "cut in half" else text


@pytest.mark.parametrize(
    "how",
    [
        "another schema",
        "no schema",
        "a field is missing",
        "no checks",
        "a field too many",
        "a check too wide",
        "checks are no list",
        "a list",
        "cut in half",
    ],
)
def test_damaged_reports_are_refused(report: Report, tmp_path: Path, how: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(damaged(report, how))
    with pytest.raises(InputError, match="run `nbl-export verify` again") as caught:
        load_report(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        load_report(tmp_path / "report.json")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="is damaged"):
        load_report(tmp_path / "report.json")
