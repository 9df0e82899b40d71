"""The stage that verifies: what it writes, when it is done again, and that a report is drawn without the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.files import sha256_of_file
from nbl_export.report.schema import load_report
from nbl_export.stages.run import Run
from nbl_export.stages.verify import redrawn, verify
from nbl_export.verify.parity.figures import MethodLoss
from nbl_export.workspace import Workspace
from tests.finished import QUICK, TWO, VERIFY, state
from tests.fixtures_graph import perturb, rerecord
from tests.interruptions import killed_at_change
from tests.listening import Notes

DRAWN = ("report.md", "report.html", "junit.xml", "plots/layers.png", "plots/speed.png")


def test_report_is_redrawn_without_the_model(stories_copy: Path, stories_out: Path) -> None:
    for name in DRAWN:
        (stories_copy / "report" / name).unlink()
    assert api.report(stories_copy).passed
    for name in ("report.json", *DRAWN):
        same = (stories_copy / "report" / name).read_bytes() == (stories_out / "report" / name).read_bytes()
        assert same, name


# Before report.json, after it, among the plots, before the record and after it.
@pytest.mark.parametrize("number", [4, 8, 40])
def test_a_kill_while_the_report_is_drawn_does_not_look_like_an_edit(stories_copy: Path, number: int) -> None:
    """A bench that joins the report changes report.json, and the record of it afterwards."""
    ws = Workspace.open(stories_copy)
    value = load_report(ws.report / "report.json")
    value = replace(value, notes=(*value.notes, "One more."))
    assert killed_at_change(number, stories_copy, lambda: redrawn(ws, value))
    shown = api.report(stories_copy)
    assert shown.notes in (value.notes, value.notes[:-1])
    after = Workspace.open(stories_copy)
    assert after.current("verify") is not None and not (after.nbl / "report.drawing.json").exists()
    assert "One more." in (ws.report / "report.md").read_text() or shown.notes == value.notes[:-1]


def test_a_drawing_that_is_not_of_this_report_is_dropped(stories_copy: Path) -> None:
    before = (stories_copy / "report" / "report.json").read_text()
    drawing = stories_copy / "nbl" / "report.drawing.json"
    drawing.write_text(before.replace("within all", "far within all"))
    assert api.report(stories_copy).passed
    assert not drawing.exists() and (stories_copy / "report" / "report.json").read_text() == before


def test_what_another_version_drew_is_drawn_anew_without_measuring_again(
    stories_copy: Path, stories_folder: Path, calibration: Any
) -> None:
    for name in DRAWN:
        (stories_copy / "report" / name).write_text("in other words")
    before = state(stories_copy)
    api.report(stories_copy)
    assert state(stories_copy) == before
    notes = Notes()
    api.run(stories_folder, stories_copy, TWO, calibration, VERIFY, notes)
    assert "verify" in notes.kept


def test_a_changed_report_is_not_shown_and_is_measured_anew(
    stories_copy: Path, stories_folder: Path, calibration: Any
) -> None:
    path = stories_copy / "report" / "report.json"
    path.write_text(path.read_text().replace("within all", "far within all"))
    with pytest.raises(
        InputError, match=r"report\.json was changed after `verify` wrote it: run `nbl-export verify"
    ):
        api.report(stories_copy)
    assert "far within all" not in (stories_copy / "report" / "report.html").read_text()
    notes = Notes()
    report = api.run(stories_folder, stories_copy, TWO, calibration, VERIFY, notes)
    assert "verify" not in notes.kept and "far within all" not in str(report.checks)


def test_steps_beyond_the_positions_are_refused_before_any_work(
    stories_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "stage", lambda *_: pytest.fail("work"))
    before = (stories_copy / "report" / "report.json").read_bytes()
    said = "--decode-steps asks for 100,000 steps after a prompt of 65 tokens, the model has 512 positions"
    with pytest.raises(InputError, match=f"{said}: ask for 447 or fewer"):
        api.verify(stories_copy, api.VerifySettings(decode_steps=100_000))
    assert (stories_copy / "report" / "report.json").read_bytes() == before


def test_its_files_are_recorded_and_it_is_done_once(stories_copy: Path) -> None:
    listener = Notes()
    run = Run.resume(stories_copy, listener)
    first = verify(run, QUICK)
    assert listener.kept == [] and first == load_report(stories_copy / "report" / "report.json")
    record = Workspace.open(stories_copy).record("verify")
    assert record is not None
    written = {str(p.relative_to(stories_copy)) for p in (stories_copy / "report").rglob("*") if p.is_file()}
    assert set(record.files) == written
    assert all(sha256_of_file(stories_copy / name) == digest for name, digest in record.files.items())
    skipped = {c.name: c.detail.partition(";")[0] for c in first.checks if c.status == "skipped"}
    assert skipped == {"method loss": "--no-quality"}
    assert verify(Run.resume(stories_copy, listener), QUICK).created == first.created
    assert listener.kept == ["verify"]
    # Other settings are another verification; so is a file of the report that is gone.
    verify(Run.resume(stories_copy, listener), api.VerifySettings(3, quality=False, speed=False))
    assert listener.kept == ["verify"]
    (stories_copy / "report" / "report.md").unlink()
    verify(Run.resume(stories_copy, listener), api.VerifySettings(3, quality=False, speed=False))
    assert listener.kept == ["verify"] and (stories_copy / "report" / "report.md").exists()


def test_a_graph_that_is_wrong_is_in_the_report_and_no_exception(stories_copy: Path) -> None:
    path = stories_copy / "model.onnx"
    initializers = onnx.load(str(path), load_external_data=False).graph.initializer
    perturb(path, next(t.name for t in initializers if t.name.endswith("nbl_linear.weight")), 1.5)
    rerecord(stories_copy, "rewrite")
    found = verify(Run.resume(stories_copy), QUICK)
    assert not found.passed and {c.name: c.status for c in found.checks}["parity"] == "failed"
    # The first of both layers that are linear.
    assert found.divergence is not None and "layer 2 " in found.divergence
    # It stays failed, however often it is drawn.
    assert not api.report(stories_copy).passed


# the loss ----------------------------------------------------------------------------------------


def test_a_bound_on_the_loss_is_a_gate(stories_copy: Path) -> None:
    """Two of stories260K's five layers cost half of its perplexity again, which parity does not see."""
    loss = load_report(stories_copy / "report" / "report.json").method_loss
    assert isinstance(loss, MethodLoss) and loss.perplexity_ratio > 1.2
    below = api.LossBound(max_perplexity_ratio=loss.perplexity_ratio - 1e-3)
    found = api.verify(stories_copy, api.VerifySettings(speed=False, bound=below))
    states = {c.name: c.status for c in found.checks}
    assert (states["parity"], states["perplexity bound"]) == ("passed", "failed") and not found.passed
    text = (stories_copy / "report" / "report.md").read_text()
    assert (
        f"**FAIL** (perplexity bound); perplexity × {loss.perplexity_ratio:.3f}, KL {loss.kl:.2g} on held-out"
        in text
    )
    assert "perplexity bound" in (stories_copy / "report" / "junit.xml").read_text()
    # Measured anew it is what it was, and a bound that it keeps passes.
    above = api.LossBound(max_kl=loss.kl + 1e-3, max_perplexity_ratio=loss.perplexity_ratio + 1e-3)
    assert api.verify(stories_copy, api.VerifySettings(speed=False, bound=above)).passed


def test_a_quick_verification_keeps_what_was_measured_of_the_same_graphs(stories_copy: Path) -> None:
    before = load_report(stories_copy / "report" / "report.json")
    assert before.method_loss is not None and before.speed is not None
    found = api.verify(stories_copy, QUICK)
    assert found.passed and (found.method_loss, found.speed) == (before.method_loss, before.speed)
    assert {name: kept.created for name, kept in found.kept.items()} == dict.fromkeys(
        ("method_loss", "speed"), before.created
    )
    assert (stories_copy / "report" / "plots" / "speed.png").exists()
    assert before.created in (stories_copy / "report" / "report.md").read_text()
    # A gate that failed is not forgotten by not measuring.
    api.verify(stories_copy, api.VerifySettings(speed=False, bound=api.LossBound(max_kl=0.0)))
    again = api.verify(stories_copy, QUICK)
    assert not again.passed and again.speed == before.speed
    assert again.kept["speed"].created == before.created


def test_nothing_is_kept_of_another_graph_or_of_a_report_that_was_edited(stories_copy: Path) -> None:
    path = stories_copy / "report" / "report.json"
    whole = path.read_bytes()
    path.write_text(path.read_text().replace("within all", "far within all"))
    assert api.verify(stories_copy, QUICK).kept == {}
    path.write_bytes(whole)
    api.select(stories_copy, api.SelectSettings(k=1))
    api.rewrite(stories_copy)
    found = api.verify(stories_copy, QUICK)
    assert found.kept == {} and found.method_loss is None and found.speed is None


@pytest.mark.parametrize(("name", "how"), [("model.onnx.data", "changed"), ("nbl/plan.json", "missing")])
def test_a_report_of_another_graph_or_plan_is_not_shown(stories_copy: Path, name: str, how: str) -> None:
    path = stories_copy / name
    if how == "missing":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(InputError, match="is missing or was changed after it was measured"):
        api.report(stories_copy)
