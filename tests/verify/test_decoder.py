"""A decoder measured part by part: what passes, what fails and where it says so, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_export.calibrate.text import CalibrationText
from nbl_export.linearize.plan import Plan
from nbl_export.verify import decoder as module
from nbl_export.verify.decoder import measure_decoder
from nbl_export.verify.parity.figures import DecoderParity, gates_for
from tests.runtime.fake_tensorrt import Graphs
from tests.verify.measured import LAYERS, PARITY, case_of, changed, checks, with_fault


def test_a_right_graph_passes_and_what_is_not_asked_for_says_so(
    graphs: Graphs, plan: Plan, text: CalibrationText
) -> None:
    found = measure_decoder(
        case_of(graphs, plan, text, graphs("concat"), graphs("concat", "fp32", LAYERS), PARITY)
    )
    assert [(c.name, c.status) for c in found.checks] == [
        ("parity", "passed"),
        ("method loss", "skipped"),
        ("speed", "skipped"),
    ]
    assert [c.detail for c in found.checks[1:]] == ["--no-quality", "--no-speed"]
    parity = found.parity
    assert isinstance(parity, DecoderParity) and parity.precision == "fp32"
    # Prompts of 64, 41 and 23 tokens after the token that a text begins with, and four steps.
    assert parity.prompt_lengths == (65, 42, 24) and len(parity.steps) == 5
    assert parity.worst < 1e-3 and 0 < parity.rounding_noise < 1e-3
    assert found.checks[0].detail == (
        f"max |Δlogit| {parity.worst:.2g} over a prefill and 4 decode steps, within all float32 gates"
    )
    assert parity.base_graph is parity.pytorch_in_precision is None
    assert found.divergence is found.method_loss is found.speed is found.engine_parity is None


@pytest.mark.parametrize("form", ["concat", "static"])
@pytest.mark.parametrize(
    ("name", "factor"),
    [("nbl_linear.weight", 1.05), ("nbl_linear.bias", 0.0), ("nbl_linear.weight", float("nan"))],
    ids=["a scaled W", "no bias", "NaN"],
)
def test_wrong_maps_fail_and_their_layer_is_named(
    graphs: Graphs, plan: Plan, text: CalibrationText, tmp_path: Path, form: str, name: str, factor: float
) -> None:
    path = with_fault(graphs(form, "fp32", LAYERS), tmp_path, "layers.3.", name, factor)
    found = measure_decoder(case_of(graphs, plan, text, graphs(form), path, PARITY))
    check = checks(found)["parity"]
    assert check.status == "failed" and "max |Δlogit| is" in check.detail
    assert found.divergence and "layer 3 (linear)" in found.divergence and found.divergence in check.detail
    # The figures are kept all the same.
    assert isinstance(found.parity, DecoderParity) and len(found.parity.steps) == 5


@pytest.mark.parametrize(("noise", "said"), [(2.6e-4, "amplifies rounding"), (2.4e-4, "after the last one")])
def test_a_plan_that_amplifies_rounding_is_told_from_a_fault_after_the_layers(
    graphs: Graphs,
    plan: Plan,
    text: CalibrationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise: float,
    said: str,
) -> None:
    """A quarter of the gate of 1e-3, where every layer agrees."""
    monkeypatch.setattr(module, "rounding_noise", lambda *_, **__: noise)
    path = with_fault(graphs("concat", "fp32", LAYERS), tmp_path, "layers.4.", "up_proj", 1.5)
    found = measure_decoder(case_of(graphs, plan, text, graphs("concat"), path, PARITY))
    assert isinstance(found.parity, DecoderParity) and found.parity.rounding_noise == noise
    assert found.divergence and said in found.divergence


def test_a_float16_file_that_does_not_run_as_it_is_fails(
    graphs: Graphs, plan: Plan, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures are those of the graph rounded as it says; what onnxruntime makes of the file is held to it too."""
    linear = graphs("concat", "fp16", LAYERS)
    other = changed(linear, tmp_path, "<f2", float("nan"))
    real = module.ort_stream

    def stream(path: Path, longest: int, rounded: bool = True, **others: Any) -> Any:
        # An operator that overflows where values are not rounded as the graph says.
        return real(path if rounded else other, longest, rounded=rounded, **others)

    case = case_of(graphs, plan, text, graphs("concat", "fp16"), linear, PARITY)
    assert checks(measure_decoder(case))["parity"].status == "passed"
    monkeypatch.setattr(module, "ort_stream", stream)
    found = measure_decoder(case)
    check = checks(found)["parity"]
    assert check.status == "failed" and check.detail.startswith("as onnxruntime runs it, max |Δlogit| is nan")
    assert isinstance(found.parity, DecoderParity) and found.parity.worst < 0.5


def test_a_half_graph_that_loses_more_than_pytorch_fails_within_the_wide_gates(
    graphs: Graphs, plan: Plan, text: CalibrationText, tmp_path: Path
) -> None:
    right = graphs("static", "fp16", LAYERS)
    wrong = changed(right, tmp_path, "<f2", 1.02)
    for path, status in ((right, "passed"), (wrong, "failed")):
        result = measure_decoder(case_of(graphs, plan, text, graphs("static", "fp16"), path, PARITY))
        check = checks(result)["parity"]
        assert check.status == status, check.detail
        assert isinstance(result.parity, DecoderParity)
        assert max(s.max_abs for s in result.parity.steps) < gates_for("float16").max_abs_logit
    assert "PyTorch's own in this precision" in check.detail and "1.5 times that" in check.detail
