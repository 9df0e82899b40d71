"""The stage that verifies: what it writes, when it is done again, and that a report is drawn without the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.files import sha256_of_file
from nbl_export.linearize.plan import load_plan
from nbl_export.report.schema import load_report
from nbl_export.stages.inspection import redrawn
from nbl_export.stages.run import Run
from nbl_export.stages.verify import verify
from nbl_export.verify.parity.figures import DecoderParity, MethodLoss
from nbl_export.workspace import Workspace
from tests.finished import QUICK, TWO, VERIFY, resumed
from tests.fixtures_graph import perturb, rerecord
from tests.processes import Notes, killed_at_change

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
    run = resumed(stories_copy, listener)
    first = verify(run, QUICK)
    assert listener.kept == [] and first == load_report(stories_copy / "report" / "report.json")
    record = Workspace.open(stories_copy).record("verify")
    assert record is not None
    written = {str(p.relative_to(stories_copy)) for p in (stories_copy / "report").rglob("*") if p.is_file()}
    assert set(record.files) == written
    assert all(sha256_of_file(stories_copy / name) == digest for name, digest in record.files.items())
    skipped = {c.name: c.detail.partition(";")[0] for c in first.checks if c.status == "skipped"}
    assert skipped == {"method loss": "--no-quality"}
    assert verify(resumed(stories_copy, listener), QUICK).created == first.created
    assert listener.kept == ["verify"]
    # Other settings are another verification; so is a file of the report that is gone.
    verify(resumed(stories_copy, listener), api.VerifySettings(3, quality=False, speed=False))
    assert listener.kept == ["verify"]
    (stories_copy / "report" / "report.md").unlink()
    verify(resumed(stories_copy, listener), api.VerifySettings(3, quality=False, speed=False))
    assert listener.kept == ["verify"] and (stories_copy / "report" / "report.md").exists()


def test_a_graph_that_is_wrong_is_in_the_report_and_no_exception(stories_copy: Path) -> None:
    path = stories_copy / "model.onnx"
    initializers = onnx.load(str(path), load_external_data=False).graph.initializer
    perturb(path, next(t.name for t in initializers if t.name.endswith("nbl_linear.weight")), 1.5)
    rerecord(stories_copy, "rewrite")
    found = verify(resumed(stories_copy), QUICK)
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


# whole ---------------------------------------------------------------------------------------------


def pasts(path: Path) -> list[str]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return [i.name for i in graph.input if i.name.startswith("past_key_values")]


def test_the_run_passes_and_exactly_two_kv_pairs_are_gone(stories_out: Path) -> None:
    report = api.report(stories_out)
    assert report.passed
    checks = {c.name: c.status for c in report.checks}
    # Whether a speed is believed depends on the machine; it never fails.
    assert list(checks) == ["graph rewrite", "parity", "speed"] and checks.pop("speed") != "failed"
    assert set(checks.values()) == {"passed"}
    assert isinstance(report.parity, DecoderParity)
    assert max(s.max_abs for s in report.parity.steps) < 1e-3
    assert len(pasts(stories_out / "baseline" / "model.onnx")) == 10
    assert pasts(stories_out / "model.onnx") == [
        f"past_key_values.{n}.{s}" for n in range(3) for s in ("key", "value")
    ]
    plan = load_plan(Workspace.open(stories_out).plan)
    assert len(plan.chosen) == 2 and plan.attention_layers == tuple(
        i for i in range(5) if i not in plan.chosen
    )


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        (api.SelectSettings(k=0), []),
        (api.SelectSettings(k=5), [0, 1, 2, 3, 4]),
    ],
    ids=["K = 0", "every layer"],
)
def test_other_selections_pass_parity(stories_copy: Path, selection: Any, layers: list[int]) -> None:
    assert list(api.select(stories_copy, selection).chosen) == layers
    api.rewrite(stories_copy)
    report = api.verify(stories_copy, api.VerifySettings(contexts=(16,), rounds=3))
    assert report.passed, report.checks
    assert report.selection.layers == tuple(layers)
    assert report.graph.after.kv_pairs == 5 - len(layers)
    if not layers:
        assert isinstance(report.method_loss, MethodLoss) and report.method_loss.perplexity_ratio == 1


# refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "verb", "command"),
    [
        ("model.onnx.data", "verify", "rewrite"),
        ("model.onnx", "verify", "rewrite"),
        ("baseline/model.onnx.data", "verify", "export"),
        ("baseline/model.onnx", "rewrite", "export"),
        ("nbl/plan.json", "rewrite", "select"),
        ("nbl/plan.safetensors", "verify", "select"),
        ("nbl/moments/002.safetensors", "select", "calibrate"),
        ("nbl/text.safetensors", "verify", "calibrate"),
    ],
)
def test_changed_files_are_refused_with_the_command_that_makes_them(
    stories_copy: Path, file: str, verb: str, command: str
) -> None:
    path = stories_copy / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    verbs: dict[str, Callable[[], Any]] = {
        "verify": lambda: api.verify(stories_copy, api.VerifySettings(speed=False)),
        "rewrite": lambda: api.rewrite(stories_copy),
        "select": lambda: api.select(stories_copy, TWO),
    }
    with pytest.raises(InputError, match=rf"(missing|changed|damaged).*run `nbl-export {command}") as caught:
        verbs[verb]()
    assert Path(file).name in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", api.CalibrateSettings(device="cuda:99")
    for ask in (
        lambda: api.calibrate(tiny_folder, out, text),
        lambda: api.run(tiny_folder, out, api.SelectSettings(k=1), text),
        lambda: api.run(
            tiny_folder, out, api.SelectSettings(k=1), verification=api.VerifySettings(device="xpu")
        ),
        lambda: api.select(out, api.SelectSettings(k=1, device="cuda:99")),
        lambda: api.verify(out, api.VerifySettings(device="cuda:99")),
        lambda: api.evaluate(out, api.EvalSettings(device="cuda:99")),
    ):
        with pytest.raises(MissingDependencyError, match=r"^--device (cuda:99|xpu): "):
            ask()
        assert not out.exists()
