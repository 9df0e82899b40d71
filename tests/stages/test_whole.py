"""stories260K through every stage: what is gone, what is kept, and what is refused."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.linearize.plan import load_plan
from nbl_export.rewrite import replace as rewrite_module
from nbl_export.verify.parity.figures import DecoderParity, MethodLoss
from nbl_export.workspace import Workspace
from tests.finished import QUICK, TWO, VERIFY, assert_same, state, times
from tests.listening import Notes


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


def test_a_second_run_does_no_work(stories_copy: Path, stories_folder: Path, calibration: Any) -> None:
    before, files = state(stories_copy), times(stories_copy)
    notes = Notes()
    report = api.run(stories_folder, stories_copy, TWO, calibration, VERIFY, notes)
    assert report.passed
    assert notes.kept == ["calibrate", "select", "export", "rewrite", "verify"]
    assert state(stories_copy) == before
    assert times(stories_copy) == files


def test_another_k_repeats_what_depends_on_it(
    stories_copy: Path, stories_folder: Path, calibration: Any
) -> None:
    before, files = state(stories_copy), times(stories_copy)
    notes = Notes()
    report = api.run(
        stories_folder, stories_copy, api.SelectSettings(k=3, criterion="cca"), calibration, QUICK, notes
    )
    assert report.passed and len(report.selection.layers) == 3
    assert notes.kept == ["calibrate", "export"]
    after = state(stories_copy)
    for stage in ("calibrate", "export"):
        assert after[stage] == before[stage]
    for stage in ("select", "rewrite", "verify"):
        assert after[stage]["key"] != before[stage]["key"]
    changed = {name for name, at in times(stories_copy).items() if files.get(name) != at}
    assert not any(n.startswith("baseline/") for n in changed)
    assert {"nbl/moments/000.safetensors", "nbl/moments/004.safetensors"} <= files.keys()
    assert not any(n.startswith("nbl/moments/") for n in changed)
    assert not {"nbl/text.safetensors", "nbl/probe.safetensors"} & changed
    assert {"nbl/plan.json", "model.onnx", "report/report.json"} <= changed
    assert len(pasts(stories_copy / "model.onnx")) == 4


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


def test_a_kept_layer_that_cannot_be_proven_is_recorded(
    stories_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays as it is; its error is infinite where the graph has no such tensor."""
    prove = rewrite_module.prove

    def without_proof_of_layer_0(*arguments: Any) -> Any:
        proofs = prove(*arguments)
        return proofs | {0: replace(proofs[0], input_error=float("inf"))}

    monkeypatch.setattr(rewrite_module, "prove", without_proof_of_layer_0)
    api.select(stories_copy, api.SelectSettings(layers=(2,)))
    api.rewrite(stories_copy)
    report = api.verify(stories_copy, QUICK)
    assert report.passed
    assert [p.input_error for p in report.graph.proofs if p.layer == 0] == [math.inf]


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


def test_a_run_makes_a_damaged_stage_again(
    stories_copy: Path, stories_out: Path, stories_folder: Path, calibration: Any
) -> None:
    file = "model.onnx.data"
    (stories_copy / file).write_bytes(b"damaged")
    report = api.run(stories_folder, stories_copy, TWO, calibration, VERIFY)
    assert report.passed
    assert_same(stories_copy / file, stories_out / file)


def test_changed_text_behind_a_pattern_is_another_calibration(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "text" / "part.jsonl.gz"
    source.parent.mkdir()
    source.write_bytes(stories_text.read_bytes())
    settings = api.CalibrateSettings(
        (str(tmp_path / "text" / "p*"),), samples=8, seq_len=64, heldout_samples=2
    )
    moments = api.calibrate(stories_folder, tmp_path / "out", settings)
    first = moments.stat().st_mtime_ns
    api.calibrate(stories_folder, tmp_path / "out", settings)
    assert moments.stat().st_mtime_ns == first
    os.utime(source, ns=(1, 1))  # as a fresh checkout does
    api.calibrate(stories_folder, tmp_path / "out", settings)
    assert moments.stat().st_mtime_ns == first
    with gzip.open(stories_text) as whole, gzip.open(source, "wb") as part:
        part.writelines(whole.readlines()[1:])
    api.calibrate(stories_folder, tmp_path / "out", settings)
    assert moments.stat().st_mtime_ns != first


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
