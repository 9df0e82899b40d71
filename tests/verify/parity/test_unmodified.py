"""Wrong linearized graphs in every precision: each is refused, and where it leaves PyTorch is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from junitparser import JUnitXml

from nbl_export import api
from nbl_export.calibrate.text import CalibrationText
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Silent
from nbl_export.records import Check
from nbl_export.rewrite.confirm import LinearPart, linear_part
from nbl_export.rewrite.replace import ProvenGraph, proven_regions, rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.verify.case import PROMPTS, DecoderCase
from nbl_export.verify.decoder import measure_parity, unlike
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.parity.decoder import compare, record
from nbl_export.verify.parity.figures import UNMODIFIED, gates_for
from nbl_export.verify.parity.unmodified import (
    Divergence,
    against_unmodified,
    differences,
    first_divergence,
    kept_cache,
    spliced,
)
from nbl_export.workspace import Workspace
from tests.fixtures_graph import perturb, plan_by_hand, rerecord
from tests.mutations import OF_ALL, OF_LAYERS, OF_RETAINED, OF_WEIGHTS, changed
from tests.verify.measured import PARITY

LAYERS, RETAINED = (
    (1, 3),
    (0, 2),
)  # the second are numbers among the layers that keep their attention: 0, 2, 4


# What is wrong with W or b itself: tests/rewrite/test_confirm.py, which `verify` asks in the same words.
AGAINST = "against the unmodified graph with the same linear layers, "


QUICK = ("fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Right:
    """A right linearized graph, what it was made of, and its case."""

    number: int  # of its precision
    baseline: Path
    path: Path
    proven: ProvenGraph
    case: DecoderCase

    def failures(self, wrong: Path) -> list[str]:
        case = DecoderCase(
            self.case.model, self.case.plan, self.baseline, wrong, PARITY, Silent(), self.case.text, ()
        )
        rows = case.rows(PROMPTS)
        return differences(
            self.baseline, wrong, case.plan, self.proven.proofs, lambda path: unlike(case, path, rows)
        )


def verdict(case: DecoderCase) -> Check:
    found = Measurement()
    measure_parity(case, found)
    return found.checks[0]


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


@pytest.fixture(scope="module", params=QUICK)
def right(
    request: pytest.FixtureRequest,
    baseline_in: Callable[[str], Path],
    stories_model: Any,
    text: CalibrationText,
    plan: Plan,
    tmp_path_factory: pytest.TempPathFactory,
) -> Right:
    baseline = baseline_in(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    rewrite_file(baseline, plan, path)
    case = DecoderCase(stories_model, plan, baseline, path, PARITY, Silent(), text, ())
    return Right(QUICK.index(request.param), baseline, path, proven_regions(baseline, plan), case)


@pytest.mark.parametrize("right", ["fp16", "int4"], indirect=True)
def test_a_right_graph_is_the_unmodified_one_to_rounding(right: Right, plan: Plan) -> None:
    check = verdict(right.case)
    assert check.status == "passed", check.detail
    parts = {i: linear_part(load_graph(right.path), i) for i in LAYERS}
    whole = {i: part for i, part in parts.items() if isinstance(part, LinearPart)}
    rows = right.case.rows(PROMPTS)
    with spliced(right.baseline, whole, right.proven.proofs, plan) as reference:
        expected = kept_cache(record(ort_stream(reference, 80), rows, 4), plan)
    found = compare(expected, record(ort_stream(right.path, 80), rows, 4), gates_for(UNMODIFIED))
    # A tenth of the gates: they are no close call for any precision.
    assert found.worst < gates_for(UNMODIFIED).max_abs_logit / 10
    assert max(s.kv_max_rel for s in found.steps) < gates_for(UNMODIFIED).max_rel_kv / 10
    assert not list(right.path.parent.glob(".*")) and not list(right.baseline.parent.glob(".*"))


@pytest.mark.parametrize("what", OF_LAYERS)
def test_a_layer_at_the_wrong_place_is_refused(right: Right, what: str) -> None:
    """Every mutation in every precision, in one layer or the other: all of them, scripts/mutation_table.py."""
    layer = LAYERS[(right.number + list(OF_LAYERS).index(what)) % 2]
    found = right.failures(changed(right.path, OF_LAYERS[what], layer, right.path.with_name("wrong.onnx")))
    named = AGAINST if what.startswith("layer") else f"linear layer {layer} is wrong: it reads"
    assert named in " ".join(found)


@pytest.mark.parametrize("what", OF_RETAINED)
def test_a_fault_in_a_layer_that_stays_is_refused(right: Right, what: str) -> None:
    number = RETAINED[(right.number + list(OF_RETAINED).index(what)) % 2]
    found = right.failures(changed(right.path, OF_RETAINED[what], number, right.path.with_name("wrong.onnx")))
    assert len(found) == 1 and AGAINST in found[0]


@pytest.mark.parametrize("what", OF_ALL)
def test_a_fault_in_all_layers_is_refused(right: Right, what: str) -> None:
    found = right.failures(changed(right.path, OF_ALL[what], 0, right.path.with_name("wrong.onnx")))
    assert found and AGAINST in found[0]


@pytest.mark.parametrize("right", ["fp16", "int4"], indirect=True)
def test_verify_says_so(right: Right, plan: Plan, tmp_path: Path) -> None:
    """All the way, with the gates that compare with PyTorch."""
    rewrite_file(right.baseline, OF_WEIGHTS["W × 1.1"](plan, 3), tmp_path / "model.onnx")
    case = DecoderCase(
        right.case.model, plan, right.baseline, tmp_path / "model.onnx", PARITY, Silent(), right.case.text, ()
    )
    check = verdict(case)
    assert (
        check.status == "failed"
        and "the linear layer 3 differs by 1.0e-01 from the plan's W u" in check.detail
    )


@pytest.mark.parametrize("right", ["fp16"], indirect=True)
def test_the_baseline_of_another_model_is_refused(right: Right, plan: Plan) -> None:
    other = replace(plan, probe_y={i: y * 2 for i, y in plan.probe_y.items()})
    (found,) = against_unmodified(right.baseline, right.path, other, lambda _: [])
    assert "the unmodified graph is not what the plan was made for" in found and "not proven" in found


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
def done(stories_out: Path) -> Any:
    found = load_plan(Workspace.open(stories_out).plan)
    assert found.chosen == (2, 3)
    return found


def test_an_intact_graph_diverges_nowhere(stories_out: Path, stories_model: Any, done: Any) -> None:
    assert first_divergence(stories_model, done, stories_out / "model.onnx") == Divergence(None, "", "", 0.0)


@pytest.mark.parametrize(("layer", "name", "expected"), FAULTS)
def test_the_fault_is_found(
    stories_copy: Path, stories_model: Any, done: Any, layer: str, name: str, expected: tuple[Any, ...]
) -> None:
    path = stories_copy / "model.onnx"
    perturb(path, weight_of(path, layer, name), 1.5)
    found = first_divergence(stories_model, done, path)
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


@pytest.mark.parametrize(("layer", "name", "expected"), [FAULTS[1]])
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
