"""What a later verification did not measure is kept of an earlier one of the same graphs, with its date and verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.checks import Check
from nbl_export.records import to_json
from nbl_export.report.kept import keeping
from nbl_export.report.page import page
from nbl_export.report.render import markdown
from nbl_export.report.schema import Report, load_report
from nbl_export.report.summary import verdict_line
from nbl_export.report.tables import report_tables

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


def test_the_first_date_stays(later: Report, earlier: Report) -> None:
    once = kept(later, earlier)
    twice = kept(replace(later, created="2028-01-01"), once)
    assert twice.kept == once.kept and twice.checks == once.checks


def test_it_is_said_wherever_it_is_shown(later: Report, earlier: Report) -> None:
    found = kept(later, earlier)
    assert verdict_line(found).startswith("(KL bound); perplexity × ")
    assert "on held-out text, measured 2026-01-01, at most KL 0.1 asked; skipped: engine run" in verdict_line(
        found
    )
    notes = {t.title.partition(":")[0]: t.note for t in report_tables(found)}
    assert "Kept from an earlier verification of the same graphs: measured 2026-01-01" in notes["Method loss"]
    assert (
        sum(
            "(contexts [16], rounds 9)" in note or "(rounds 9, contexts [16])" in note
            for note in notes.values()
        )
        == 2
    )
    assert all("Kept" not in t.note for t in report_tables(earlier))
    for text in (markdown(found), page(found, {})):
        assert text.count("Kept from an earlier verification") == 3
    elsewhere = replace(found, environment=replace(found.environment, processor="Another"))
    assert any(f"on {found.environment.processor}" in t.note for t in report_tables(elsewhere))


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


def test_what_is_measured_again_replaces_what_was(later: Report, earlier: Report) -> None:
    fresh = replace(later, method_loss=earlier.method_loss, checks=(*later.checks[:2], *later.checks[3:]))
    found = kept(fresh, earlier)
    assert "method_loss" not in found.kept and "KL bound" not in {c.name for c in found.checks}


def test_it_is_written_and_read(later: Report, earlier: Report, tmp_path: Path) -> None:
    import json

    found = kept(later, earlier)
    path = tmp_path / "report.json"
    raw: dict[str, Any] = {"schema": Report.SCHEMA, "verdict": "failed", **to_json(found)}
    path.write_text(json.dumps(raw))
    assert load_report(path) == found
    # A report of before there was anything kept.
    del raw["kept"]
    path.write_text(json.dumps(raw))
    assert load_report(path).kept == {}
