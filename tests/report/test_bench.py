"""A bench comes back from its file as it was, and what is none is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import inf
from pathlib import Path

import pytest

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.models.source import ModelIdentity
from nbl_export.report.bench import BenchReport, load_bench
from nbl_export.report.environment import environment
from nbl_export.report.render import write_bench
from nbl_export.report.schema import Report
from nbl_export.settings import BenchSettings
from nbl_export.verify.speed.values import Speed


@pytest.fixture
def bench(engine_speed: Speed) -> BenchReport:
    settings = asdict(BenchSettings(peers=("eager",)))
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    checks = (Check("ceilings", "passed", "fine"), Check("nowhere slower", "skipped", "nothing resolved"))
    model = ModelIdentity("a/model", "folder", None, "0" * 64)
    machine, hashes = environment(), {"rewrite": "0" * 64}
    return BenchReport("now", "1.0", model, machine, settings, hashes, checks, ("a note",), engine_speed)


def test_it_comes_back_from_its_file(bench: BenchReport, tmp_path: Path) -> None:
    write_bench(tmp_path, bench)
    found = load_bench(tmp_path / "bench.json")
    assert found.speed == bench.speed and found.checks == bench.checks and found.settings == bench.settings
    assert found.as_json() == bench.as_json() and found.passed
    assert (found.notes, found.hashes, found.created) == (("a note",), {"rewrite": "0" * 64}, "now")


def test_bounds_that_are_infinite_come_back(bench: BenchReport, tmp_path: Path) -> None:
    """Fewer than six pairs bound a median nowhere; JSON has no infinity."""
    raw = bench.as_json()
    over = raw["speed"]["cells"][0]["results"][1]["over_base"]
    over["least"], over["most"] = "-inf", "inf"
    (tmp_path / "bench.json").write_text(json.dumps(raw, allow_nan=False))
    found = load_bench(tmp_path / "bench.json").speed.cells[0].results[1].over_base
    assert found is not None and (found.least, found.most) == (-inf, inf)


@pytest.mark.parametrize("gone", ["model", "settings", "hashes", "checks", "speed"])
def test_a_bench_without_a_section_is_damaged(bench: BenchReport, tmp_path: Path, gone: str) -> None:
    raw = bench.as_json()
    del raw[gone]
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"bench\.json is damaged .*: run `nbl-export bench` again\.$"):
        load_bench(tmp_path / "bench.json")


def test_a_report_is_no_bench(report: Report, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(report.as_json()))
    with pytest.raises(InputError, match=r"is no bench of this version .*run `nbl-export bench` again"):
        load_bench(tmp_path / "bench.json")
    with pytest.raises(InputError, match="The bench is missing"):
        load_bench(tmp_path / "nowhere.json")
