"""Speed sections of the first version, as its code wrote them, are read with every figure that they have.

``version_1.json`` holds the sections ``speed`` and ``engine_speed`` of a report, and a whole ``bench.json``, of
stories260K; the engines are scripted.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.records import from_json, to_json
from nbl_export.report.bench import load_bench
from nbl_export.report.legacy_speed import bench_section, engine_speed_section, speed_section
from nbl_export.report.plots import report_plots
from nbl_export.report.render import markdown, write_bench
from nbl_export.report.schema import Report, load_report
from nbl_export.report.speed import ENGINES, speed_tables
from nbl_export.verify.speed.ceiling import ceiling
from nbl_export.verify.speed.checks import bench_checks, speed_check
from nbl_export.verify.speed.values import Speed


@pytest.fixture
def old() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((Path(__file__).parent / "version_1.json").read_text(encoding="utf-8"))
    return value


def read(section: Any) -> Speed:
    return from_json(Speed, section, "it", "do it again")


def test_speed_of_a_pair(old: dict[str, Any]) -> None:
    raw = old["speed"]
    speed = read(speed_section(raw))
    machine, roofline = speed.machine, speed.machine.roofline
    assert (machine.device, machine.threads) == (raw["provider"], raw["threads"]) and roofline is not None
    assert to_json(roofline) == raw["roofline"] and speed.rounds == raw["rounds"]
    base, linearized = speed.candidates
    assert to_json(base) == {"name": "base", "base": None, "cost": raw["base_cost"]}
    assert to_json(linearized) == {"name": "linearized", "base": "base", "cost": raw["linearized_cost"]}
    assert len(speed.speedups()) == len(raw["cells"]) == 3
    for (cell, result, over), was in zip(speed.speedups(), raw["cells"], strict=True):
        assert (cell.phase, cell.batch, cell.context) == (was["phase"], 1, was["context"])
        for one in cell.results:
            assert to_json(one.timing) == {**was[one.name], "p99_ms": None} and one.rounds == was["rounds"]
        assert (over.value, over.low, over.high) == (
            was["speedup"],
            was["speedup_low"],
            was["speedup_high"],
        )
        assert base.cost and linearized.cost and result.ceiling == was["ceiling"]
        assert result.ceiling == ceiling(base.cost, linearized.cost, roofline, cell.phase, cell.context)
        tokens = 1 if cell.phase == "decode" else cell.context
        assert result.tokens_per_second == pytest.approx(1e3 * tokens / was["linearized"]["median_ms"])
    first, second, third = speed.speedups()
    assert [over.resolved for _, _, over in (first, second)] == [True, True]
    assert first[2].least == raw["cells"][0]["speedup_least"] > 1
    assert speed_check(speed).status == "passed"
    # Called resolved then, by three rounds: too few for that.
    assert raw["cells"][2]["resolved"] and raw["cells"][2]["rounds"] == 3
    assert not third[2].resolved and (third[2].least, third[2].most) == (-math.inf, math.inf)


def test_an_encoder_and_a_report_before_there_were_rooflines(old: dict[str, Any]) -> None:
    raw = old["speed"]
    del raw["roofline"]
    for cell in raw["cells"]:
        for key in ("speedup_least", "speedup_most"):
            del cell[key]
        cell["phase"] = "encode"
    speed = read(speed_section(raw))
    assert speed.phases == ("encode",) and speed.machine.roofline is None
    over = speed.speedups()[0][2]
    assert over.resolved and math.isnan(over.least)
    assert "allow on any machine" in speed_tables("speed", speed)[0].note


def test_speed_of_engines(old: dict[str, Any]) -> None:
    raw = old["engine_speed"]
    speed = read(engine_speed_section(raw))
    assert (speed.machine.device, speed.machine.compute_capability) == ("NVIDIA L4", "8.9")
    assert speed.base == "base engine" and speed.linearized == "linearized engine" and speed.rounds == 7
    found = {(r.name, c.context, c.phase): r for c in speed.cells for r in c.results}
    assert len(found) == 2 * len(raw["latencies"]) == 6
    for was in raw["latencies"]:
        for phase in ("prefill", "decode"):
            result = found[was["name"], was["context"], phase]
            timing = result.timing
            assert (timing.median_ms, timing.p99_ms) == (was[f"{phase}_ms"], was[f"{phase}_p99_ms"])
            assert math.isnan(timing.low_ms) and result.cache_bytes == was["memory_bytes"]
        assert result.tokens_per_second == pytest.approx(was["tokens_per_second"])
    ((prefill, _, a), (decode, _, b)) = speed.speedups()
    (ratios,) = raw["speedups"]
    assert [(c.phase, c.context) for c in (prefill, decode)] == [("prefill", 16), ("decode", 16)]
    assert ratios["context"] == 16
    assert (a.value, b.value) == (ratios["prefill"], ratios["decode"]) and not (a.resolved or b.resolved)
    assert sorted(speed.absent()) == sorted(raw["absent"].items())
    assert [len(c.absent) for c in speed.cells] == [1, 1, 2, 2]
    # What is not known is not drawn.
    (table,) = speed_tables(ENGINES, speed)
    assert "quartiles" not in table.columns and not any("nan" in cell for row in table.rows for cell in row)


def test_a_bench(old: dict[str, Any], tmp_path: Path) -> None:
    raw = old["bench"]
    (tmp_path / "bench.json").write_text(json.dumps(raw), encoding="utf-8")
    value = load_bench(tmp_path / "bench.json")
    speed = value.speed
    assert [to_json(c) for c in speed.candidates] == raw["competitors"]
    assert speed.machine.roofline and to_json(speed.machine.roofline) == raw["roofline"]
    assert (value.created, dict(value.hashes), value.passed) == (raw["created"], raw["hashes"], True)
    for cell, was in zip(speed.cells, raw["cells"], strict=True):
        assert (cell.phase, cell.batch, cell.context) == (was["phase"], was["batch"], was["context"])
        assert dict(cell.absent) == was["absent"]
        for result, lap in zip(cell.results, was["laps"], strict=True):
            again = to_json(result)
            assert again.pop("linearized_over") == lap.pop("beaten")
            assert again.pop("timing") == {**lap.pop("timing"), "p99_ms": None}
            assert again == lap
    assert speed.cells[1].absent
    # Judged now as it was then, written in the new form, and read again.
    by_name = {c.name: c.status for c in value.checks}
    assert {c.name: c.status for c in bench_checks(speed)}["ceilings"] == by_name["ceilings"]
    write_bench(tmp_path / "new", value)
    new = json.loads((tmp_path / "new" / "bench.json").read_text(encoding="utf-8"))
    assert new["schema"] == "nbl-export/bench/2"
    assert load_bench(tmp_path / "new" / "bench.json") == value


def test_a_report_with_all_of_them(report: Report, old: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    body = {k: v for k, v in old["bench"].items() if k not in ("schema", "verdict")}
    raw = {**report.as_json(), "speed": old["speed"], "engine_speed": old["engine_speed"], "bench": body}
    raw["schema"] = "nbl-export/report/1"
    path.write_text(json.dumps(raw), encoding="utf-8")
    value = load_report(path)
    assert value.speed == read(speed_section(old["speed"]))
    assert value.bench is not None and value.bench.hashes == old["bench"]["hashes"]
    text = markdown(value, report_plots(value))
    assert all(name in text for name in ("plots/speed.png", "plots/engines.png", "plots/bench.png"))
    for plot in report_plots(value).values():
        assert plot.svg(False).startswith("<svg")
    # As this version writes it.
    path.write_text(json.dumps(value.as_json()), encoding="utf-8")
    assert replace(load_report(path), engine_speed=None) == replace(value, engine_speed=None)


def test_what_is_in_the_new_form_stays(old: dict[str, Any]) -> None:
    for section, raw in (
        (speed_section, old["speed"]),
        (engine_speed_section, old["engine_speed"]),
        (bench_section, {k: v for k, v in old["bench"].items() if k not in ("schema", "verdict")}),
    ):
        once = section(raw)
        assert section(once) == once


@pytest.mark.parametrize("name", ["speed", "engine_speed", "bench"])
def test_a_damaged_section_is_one_sentence(old: dict[str, Any], name: str) -> None:
    section = {"speed": speed_section, "engine_speed": engine_speed_section, "bench": bench_section}[name]
    with pytest.raises(InputError, match=f"'{name}' of the report is damaged"):
        section({k: v for k, v in old[name].items() if k not in ("cells", "latencies")})
    broken: Any = [1, 2]
    with pytest.raises(InputError, match="damaged"):
        section(broken)
