"""Graphs for engines that do not know opset 23: norms, rotary embeddings and attention in basic operators.

They are rewritten, and held to the model, as all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nbl_export.export.forms import FORMS
from nbl_export.export.ranges import save_in_precision
from nbl_export.export.torch import export_torch
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings.choices import OLDEST_OPSET
from tests.end_to_end.matrix import CHOSEN, ROWS, parity
from tests.exhaustive import exhaustive
from tests.exporters import GRAPH
from tests.families import DECODERS, Calibrated

# What differs in the operators that the exporter decomposes: rotary embeddings, windows, experts, LayerNorms, sinks,
# branches, scans.
USUAL = ("gemma2", "phi3", "gpt2")
NEWER = {"Attention", "RMSNormalization", "RotaryEmbedding", "Gelu", "TensorScatter", "Swish"}


def of_opset(graph: Path, opset: int) -> None:
    """``graph`` says that it is of this opset, and every operator in it is."""
    model = onnx.load(str(graph), load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    assert model.ir_version == 8  # what the first readers of opset 18 knew
    operators = {node.op_type for node in model.graph.node}
    assert not operators & NEWER and {"MatMul", "Softmax"} <= operators
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("family", [f if f in USUAL else pytest.param(f, marks=exhaustive) for f in DECODERS])
def test_every_family_is_rewritten_and_right(
    family: str, calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """Ragged prefill and decode with half the layers linear, in float32 and in float16."""
    case, plan = calibrated_of(family), calibrated_of(family).plan(CHOSEN["half"])
    source = tmp_path / GRAPH
    export_torch(case.model, source, form=replace(FORMS["concat"], opset=OLDEST_OPSET))
    of_opset(source, OLDEST_OPSET)
    half = tmp_path / "fp16" / GRAPH
    half.parent.mkdir()
    save_in_precision(load_graph(source), half, precision_of("fp16"), ROWS)
    for graph, precision in ((source, "fp32"), (half, "fp16")):
        rewritten = tmp_path / f"linear-{precision}" / GRAPH
        rewrite_file(graph, plan, rewritten)
        of_opset(rewritten, OLDEST_OPSET)
        found = parity(case.model, plan, rewritten, precision_of(precision).gates)
        assert found.failures() == []
