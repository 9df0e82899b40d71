"""Faults injected into a finished graph: verification fails and names where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from junitparser import JUnitXml

from nbl_export import api
from nbl_export.linearize.plan import load_plan
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.verify.parity.unmodified import Divergence, first_divergence
from nbl_export.workspace import Workspace
from tests.fixtures_graph import perturb, plan_by_hand, rerecord

# The finished run: layers 2 and 3 of 0 … 4 are linear.
FAULTS = [
    pytest.param("layers.1.", "down_proj", (2, "input", "linear"), id="MLP of layer 1"),
    pytest.param("layers.2.", "nbl_linear.weight", (2, "output", "linear"), id="W of layer 2"),
    pytest.param("layers.3.", "nbl_linear.weight", (3, "output", "linear"), id="W of layer 3"),
    pytest.param("layers.1.", "o_proj", (1, "output", "attention"), id="o_proj of layer 1"),
    pytest.param("layers.0.", "v_proj", (0, "output", "attention"), id="v_proj of layer 0"),
    pytest.param("layers.3.", "gate_proj", (4, "input", "attention"), id="MLP of layer 3"),
    pytest.param("layers.4.", "up_proj", (None, "", ""), id="MLP of the last layer"),
]


def weight_of(path: Path, layer: str, name: str) -> str:
    names = [t.name for t in onnx.load(str(path), load_external_data=False).graph.initializer]
    (found,) = [n for n in names if layer in n and name in n]
    return found


@pytest.fixture
def plan(stories_out: Path) -> Any:
    plan = load_plan(Workspace.open(stories_out).plan)
    assert plan.chosen == (2, 3)
    return plan


def test_an_intact_graph_diverges_nowhere(stories_out: Path, stories_model: Any, plan: Any) -> None:
    assert first_divergence(stories_model, plan, stories_out / "model.onnx") == Divergence(None, "", "", 0.0)


@pytest.mark.parametrize(("layer", "name", "expected"), FAULTS)
def test_the_fault_is_found(
    stories_copy: Path, stories_model: Any, plan: Any, layer: str, name: str, expected: tuple[Any, ...]
) -> None:
    path = stories_copy / "model.onnx"
    perturb(path, weight_of(path, layer, name), 1.5)
    found = first_divergence(stories_model, plan, path)
    assert (found.layer, found.where, found.kind) == expected
    if expected[0] is None:
        assert "after the last one" in str(found)
    else:
        assert f"layer {expected[0]} ({expected[2]})" in str(found) and found.error > 1e-3


def test_the_fault_is_found_on_the_residual_stream(
    stories_out: Path, stories_model: Any, tmp_path: Path
) -> None:
    plan = plan_by_hand(stories_out, (1, 2), "residual")
    path = tmp_path / "model.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan, path)
    assert first_divergence(stories_model, plan, path).layer is None
    # The stream itself is compared here, so a factor that a norm would hide is seen.
    perturb(path, weight_of(path, "layers.0.", "down_proj"), 1.5)
    found = first_divergence(stories_model, plan, path)
    assert (found.layer, found.where, found.kind) == (1, "input", "linear")


def test_numbers_that_are_none_are_found(stories_copy: Path, stories_model: Any, plan: Any) -> None:
    path = stories_copy / "model.onnx"
    perturb(path, weight_of(path, "layers.1.", "o_proj"), float("nan"))
    found = first_divergence(stories_model, plan, path)
    assert (found.layer, found.where) == (1, "output")


@pytest.mark.parametrize(("layer", "name", "expected"), [FAULTS[0], FAULTS[1], FAULTS[3], FAULTS[-1]])
def test_verify_fails_and_says_where(
    stories_copy: Path, layer: str, name: str, expected: tuple[Any, ...]
) -> None:
    path = stories_copy / "model.onnx"
    perturb(path, weight_of(path, layer, name), 1.5)
    rerecord(stories_copy, "rewrite")
    shutil.rmtree(stories_copy / "report")
    report = api.verify(stories_copy, api.VerifySettings(quality=False, speed=False))
    assert not report.passed
    (check,) = [c for c in report.checks if c.name == "parity"]
    assert check.status == "failed" and "max |Δlogit| is" in check.detail
    assert report.divergence is not None and report.divergence in check.detail
    wanted = "after the last one" if expected[0] is None else f"layer {expected[0]} ({expected[2]})"
    assert wanted in report.divergence
    folder = stories_copy / "report"
    raw = json.loads((folder / "report.json").read_text())
    assert raw["verdict"] == "failed" and raw["divergence"] == report.divergence
    text = (folder / "report.md").read_text()
    assert text.startswith("# nbl-export report: FAIL") and wanted in text
    assert JUnitXml.fromfile(str(folder / "junit.xml")).failures == 1


def test_verify_of_a_graph_full_of_nan_writes_its_report(stories_copy: Path) -> None:
    path = stories_copy / "model.onnx"
    perturb(path, weight_of(path, "layers.0.", "v_proj"), float("nan"))
    rerecord(stories_copy, "rewrite")
    report = api.verify(stories_copy, api.VerifySettings(quality=False, speed=False))
    assert not report.passed
    assert report.divergence is not None and "layer 0 (attention)" in report.divergence
    (check,) = [c for c in report.checks if c.name == "parity"]
    for gate in ("max |Δlogit|", "cosine", "KL", "top-1 agreement", "KV relative error"):
        assert gate in check.detail
    assert "FAIL" in (stories_copy / "report" / "report.md").read_text()
