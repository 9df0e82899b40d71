"""A report holds what the stages recorded: compared with the files of the folder as they stand there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import __version__
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.models.source import find_model
from nbl_export.records import Check, to_json
from nbl_export.report.assemble import (
    assemble,
    keeping,
)
from nbl_export.report.schema import Report
from nbl_export.verify.measurement import Measurement
from nbl_export.workspace import Workspace


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


# what an earlier verification measured --------------------------------------------------------------

GRAPHS, ENGINES = ("model.onnx", "nbl/plan.json"), ("engine/model.engine",)
LATER = "2027-01-02T03:04:05+00:00"


@pytest.fixture
def earlier(full: Report) -> Report:
    """With a bound that was asked for and not kept."""
    checks = (*full.checks, Check("KL bound", "failed", "KL 0.4 on held-out text, above the 0.1 asked for"))
    settings = {**full.settings, "verify": {"rounds": 9, "contexts": [16], "bound": {"max_kl": 0.1}}}
    return replace(
        full, checks=checks, settings=settings, hashes={**full.hashes, ENGINES[0]: "e"}, created="2026-01-01"
    )


@pytest.fixture
def later(earlier: Report) -> Report:
    """The same graphs, neither loss nor speed measured, the engines not run."""
    checks = (
        *(c for c in earlier.checks if c.name in ("graph rewrite", "parity")),
        Check("method loss", "skipped", "--no-quality"),
        Check("speed", "skipped", "--no-speed"),
        Check("engine run", "skipped", "not run: no NVIDIA GPU"),
    )
    settings = {**earlier.settings, "verify": {"quality": False}}
    return replace(
        earlier,
        created=LATER,
        checks=checks,
        settings=settings,
        method_loss=None,
        speed=None,
        engine_parity=None,
        engine_speed=None,
    )


def kept(later: Report, earlier: Report | None) -> Report:
    return keeping(later, earlier, GRAPHS, ENGINES)


def test_sections_keep_their_date_their_settings_and_their_verdict(later: Report, earlier: Report) -> None:
    found = kept(later, earlier)
    assert (found.method_loss, found.speed) == (earlier.method_loss, earlier.speed)
    assert found.engine_speed == earlier.engine_speed
    assert set(found.kept) >= {"method_loss", "speed", "engine_speed"}
    assert {k.created for k in found.kept.values()} == {"2026-01-01"}
    assert found.kept["speed"].settings == earlier.settings["verify"]
    checks = {c.name: c for c in found.checks}
    # A gate that failed has failed still.
    assert not found.passed and checks["KL bound"].status == "failed"
    assert checks["KL bound"].detail.endswith("asked for (measured 2026-01-01)")
    assert checks["speed"].status == "passed"
    assert checks["speed"].detail.endswith("(measured 2026-01-01, now --no-speed)")
    assert checks["method loss"].status == "skipped"
    assert checks["method loss"].detail == "--no-quality; what is shown was measured 2026-01-01"
    assert len(checks) == len(found.checks)
    assert (found.created, found.settings) == (later.created, later.settings)


@pytest.mark.parametrize("name", GRAPHS)
def test_of_other_graphs_nothing_is_kept(later: Report, earlier: Report, name: str) -> None:
    assert kept(replace(later, hashes={**later.hashes, name: "0" * 64}), earlier).kept == {}
    without = {n: d for n, d in earlier.hashes.items() if n != name}
    assert kept(later, replace(earlier, hashes=without)) == later
    assert kept(later, None) == later
    assert keeping(later, earlier, (), ()) == later


def test_of_other_engines_only_what_the_graphs_gave_is_kept(later: Report, earlier: Report) -> None:
    other = replace(later, hashes={**later.hashes, ENGINES[0]: "f"})
    assert set(kept(other, earlier).kept) == {"method_loss", "speed"}
    assert set(keeping(later, earlier, GRAPHS, ()).kept) == {"method_loss", "speed"}
    # What failed to run now has no parity of before.
    for name in ("engine run", "engine parity"):
        failed = replace(later, checks=(*later.checks[:-1], Check(name, "failed", "does not load")))
        assert set(kept(failed, earlier).kept) == {"method_loss", "speed"}
