"""The report as a value and as JSON: nothing is lost, nothing is let through, the verdict is strict."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.models.source import ModelIdentity
from nbl_export.records import Check
from nbl_export.report.render import write_bench
from nbl_export.report.schema import BenchReport, Report, environment, load_bench, load_report
from nbl_export.settings import BenchSettings
from nbl_export.verify.parity.figures import DecoderParity
from nbl_export.verify.speed.values import Speed
from scripts.json_schemas import KINDS, file_of, schema_of


def strictly(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are no numbers."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_round_trip(report: Report, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report.as_json())
    assert load_report(tmp_path / "report.json") == report
    raw = strictly((tmp_path / "report.json").read_text())
    assert raw["schema"] == Report.SCHEMA == "nbl-export/report/2"
    assert set(raw) == {"schema", "verdict", *(f.name for f in fields(Report))}


def test_reading_a_report_imports_nothing_heavy() -> None:
    """Sections are values of the rooms that measure them, whose libraries a reader does not need."""
    heavy = ("torch", "numpy", "scipy", "onnx_ir", "onnxruntime", "transformers", "matplotlib")
    code = f"import sys, nbl_export.report.schema; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (("passed", "skipped"), "passed"),
        (("passed", "failed"), "failed"),
        (("skipped",), "failed"),
        ((), "failed"),
    ],
)
def test_a_verdict_needs_a_check_that_passed_and_none_that_failed(
    report: Report, tmp_path: Path, states: Any, verdict: str
) -> None:
    raw = replace(report, checks=tuple(Check(state, state, "") for state in states)).as_json()
    assert raw["verdict"] == verdict
    # One that was written is not believed.
    write_json(tmp_path / "report.json", raw | {"verdict": "passed"})
    assert load_report(tmp_path / "report.json").verdict == verdict


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "nbl-export/report/1"}, r"is no report of this version \(nbl-export/report/2\)"),
        ({"schema": None}, "is no report of this version"),
        ({"checks": None}, "is damaged"),
        ({"checks": [{"name": "parity"}]}, "is damaged"),
        ({"extra": 1}, "is damaged"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    report: Report, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    raw = {name: value for name, value in (report.as_json() | change).items() if value is not None}
    (tmp_path / "report.json").write_text(json.dumps(raw))
    with pytest.raises(
        InputError, match=rf"report\.json {words}.*run `nbl-export verify` again\.$"
    ) as caught:
        load_report(tmp_path / "report.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is missing"):
        load_report(tmp_path / "nowhere.json")


# the machine, a bench, the published schemas ---------------------------------------------------------


@pytest.fixture
def bench(engine_speed: Speed) -> BenchReport:
    settings = asdict(BenchSettings(peers=("eager",)))
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    checks = (Check("ceilings", "passed", "fine"), Check("nowhere slower", "skipped", "nothing resolved"))
    model = ModelIdentity("a/model", "folder", None, "0" * 64)
    machine, hashes = environment(), {"rewrite": "0" * 64}
    return BenchReport("now", "1.0", model, machine, settings, hashes, checks, ("a note",), engine_speed)


def test_a_bench_comes_back_from_its_file(bench: BenchReport, report: Report, tmp_path: Path) -> None:
    write_bench(tmp_path, bench)
    assert load_bench(tmp_path / "bench.json") == bench
    (tmp_path / "bench.json").write_text(json.dumps(report.as_json()))
    with pytest.raises(InputError, match=r"is no bench of this version .*run `nbl-export bench` again"):
        load_bench(tmp_path / "bench.json")


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_schema_is_of_what_is_written(kind: Any) -> None:
    published = json.loads(file_of(kind).read_text(encoding="utf-8"))
    assert published == schema_of(kind), "run python scripts/json_schemas.py"
    Draft202012Validator.check_schema(published)
