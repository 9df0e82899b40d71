"""A report holds what the stages recorded: compared with the files of the folder as they stand there."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from nbl_export import __version__
from nbl_export.checks import Check
from nbl_export.engine.pair import EngineFile
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.models.source import find_model
from nbl_export.records import to_json
from nbl_export.report.assemble import assemble, created, rewrite_of, selection_of
from nbl_export.report.schema import Report
from nbl_export.verify.measurement import Measurement
from nbl_export.workspace import Workspace
from tests.engine.conftest import manifest_by_hand


def read(out: Path, name: str) -> Any:
    return json.loads((out / "nbl" / name).read_text())


@pytest.fixture
def assembled(stories_copy: Path, stories_folder: Path) -> Any:
    """Called with what was measured and engines: the report of the finished run."""

    def report(measured: Measurement | None = None, engines: Any = ()) -> Report:
        ws = Workspace.open(stories_copy)
        plan, source = load_plan(ws.plan), find_model(str(stories_folder))
        return assemble(ws, source, plan, {"rounds": 3}, measured or Measurement(), engines)

    return report


def test_it_holds_what_was_recorded(assembled: Any, stories_copy: Path) -> None:
    report = assembled()
    raw = to_json(report)
    state = read(stories_copy, "workspace.json")
    stages = {name: state["stages"][name] for name in ("calibrate", "select", "export", "rewrite")}
    assert raw["settings"] == {**{name: s["settings"] for name, s in stages.items()}, "verify": {"rounds": 3}}
    assert raw["stage_seconds"] == {name: s["seconds"] for name, s in stages.items()}
    files = {name: digest for s in stages.values() for name, digest in s["files"].items()}
    assert raw["hashes"] == {"model": state["model"]["fingerprint"], **files}
    assert raw["notes"] == [note for s in stages.values() for note in s["notes"]]
    candidates = read(stories_copy, "candidates.json")["candidates"]
    assert [(c["layer"], c["cca"], c["kind"]) for c in raw["selection"]["candidates"]] == [
        (c["layer"], c["cca"], c["kind"]) for c in candidates
    ]
    plan = read(stories_copy, "plan.json")
    assert raw["selection"]["criterion"] == plan["criterion"] == "cca" and raw["selection"]["layers"] == [
        2,
        3,
    ]
    summary = read(stories_copy, "rewrite.json")
    assert all(raw["graph"][name] == summary[name] for name in ("before", "after", "kv_layers", "proofs"))
    exported = stages["export"]["settings"]
    assert [raw["graph"][n] for n in ("precision", "kv_cache", "opset", "task")] == [
        exported["precision"],
        exported["kv_cache"],
        exported["opset"],
        None,
    ]
    assert (report.model.hidden_size, report.model.layers, report.tool_version) == (64, 5, __version__)
    assert raw["model"]["fingerprint"] == state["model"]["fingerprint"] and "path" not in raw["model"]


def test_it_holds_what_was_measured(assembled: Any, report: Report) -> None:
    bare = assembled()
    assert (bare.parity, bare.method_loss, bare.speed, bare.engines, bare.bench) == (None,) * 5
    assert [c.name for c in bare.checks] == ["graph rewrite"] and bare.passed
    measured = Measurement(
        parity=report.parity,
        divergence="layer 1",
        method_loss=report.method_loss,
        speed=report.speed,
        checks=(Check("parity", "failed", "far"),),
        notes=("measured",),
    )
    found = assembled(measured)
    assert (found.parity, found.method_loss, found.speed) == (report.parity, report.method_loss, report.speed)
    assert found.divergence == "layer 1" and found.notes == (*bare.notes, "measured")
    # The rewrite's verdict comes first, and does not hide another's.
    assert [(c.name, c.status) for c in found.checks] == [("graph rewrite", "passed"), ("parity", "failed")]
    assert found.checks[0].detail.startswith("2 attention layers and KV pairs gone") and not found.passed


def test_a_graph_without_a_cache_lost_no_pairs(assembled: Any, stories_copy: Path) -> None:
    path = stories_copy / "nbl" / "rewrite.json"
    raw = json.loads(path.read_text())
    raw["before"]["kv_pairs"] = raw["after"]["kv_pairs"] = 0
    path.write_text(json.dumps(raw))
    assert assembled().checks[0].detail.startswith("2 attention layers gone, every region proven")


def test_a_build_is_part_of_it_only_with_its_engines(assembled: Any, stories_copy: Path) -> None:
    ws = Workspace.open(stories_copy)
    ws.finish("build", {"library": "rtx"}, {}, [], 1.5, ["built"])
    assert "build" not in assembled().settings and assembled().engines is None
    manifest = manifest_by_hand()
    found = assembled(engines=[EngineFile(stories_copy / "engine" / "model.engine", manifest)])
    assert found.engines == (manifest,) and found.settings["build"] == {"library": "rtx"}
    assert found.stage_seconds["build"] == 1.5 and "built" in found.notes


def test_a_calibration_that_is_not_recorded_has_no_sources(stories_copy: Path) -> None:
    ws = Workspace.open(stories_copy)
    plan, asked = load_plan(ws.plan), read(stories_copy, "workspace.json")["stages"]["calibrate"]["settings"]
    found = selection_of(ws, plan)
    assert list(found.sources) == asked["sources"] and found.seed == asked["seed"] == 0
    assert found.calibration_tokens == plan.calibration_tokens
    state = read(stories_copy, "workspace.json")
    del state["stages"]["calibrate"]
    (stories_copy / "nbl" / "workspace.json").write_text(json.dumps(state))
    assert selection_of(Workspace.open(stories_copy), plan) == replace(found, sources=())


@pytest.mark.parametrize(
    ("name", "command"),
    [("rewrite.json", "rewrite"), ("candidates.json", "select"), ("export.json", "export")],
)
def test_a_record_that_is_damaged_names_the_command(
    assembled: Any, stories_copy: Path, name: str, command: str
) -> None:
    (stories_copy / "nbl" / name).write_text('{"more": 1}')
    with pytest.raises(InputError, match=rf"run `nbl-export {command}` again\.$"):
        assembled()
    (stories_copy / "nbl" / name).unlink()
    with pytest.raises(InputError, match=rf"is missing.*run `nbl-export {command}` again\.$"):
        assembled()


def test_the_rewrite_as_recorded(stories_copy: Path) -> None:
    found = rewrite_of(Workspace.open(stories_copy))
    assert (found.before.kv_pairs, found.after.kv_pairs, found.kv_layers) == (5, 3, (0, 1, 4))
    assert [p.layer for p in found.proofs] == list(range(5))


def test_the_time_is_now_in_utc() -> None:
    found = datetime.fromisoformat(created())
    assert found.utcoffset() == timedelta(0) and found.microsecond == 0
    assert abs(datetime.now(timezone.utc) - found) < timedelta(seconds=5)
