"""Attention that is built otherwise, from calibration to the rewritten graph: its logits are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.probe import probe_model
from nbl_export.export.forms import FORMS
from nbl_export.export.ranges import save_in_precision
from nbl_export.export.torch import export_torch, trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.operators import readers
from nbl_export.graph.precision import precision_of
from nbl_export.linearize.swap import linearized
from nbl_export.models.layers import attention_layers
from nbl_export.rewrite.replace import linearized_layers, rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings.choices import OLDEST_OPSET
from tests.end_to_end.matrix import CHOSEN, ROWS, parity, rewritten
from tests.exhaustive import exhaustive
from tests.exporters import FLAT, GRAPH, NUMBERED, Names, torchscript
from tests.families import DECODERS, Calibrated, build
from tests.tiny_types import tiny_model

STEPS = 3


# A block with experts and one without.
TWO_LAYERS = {"num_hidden_layers": 2, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        # Two stages of projections, a cache of what lies between them, complex rotary embeddings.
        pytest.param("deepseek_v2", "concat", marks=exhaustive),
        ("deepseek_v3", "static"),
        # Convolutions in between: the second region of the graph is the fourth layer of the model.
        ("lfm2", "none"),
        pytest.param("mixtral", "concat", marks=exhaustive),
    ],
)
def test_from_calibration_to_logits(model_type: str, form: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, **(TWO_LAYERS if "deepseek" in model_type else {}))
    tokens = np.random.default_rng(0).integers(3, 260, (32, 24), dtype=np.int32)
    calibrated = Calibrated(model, collect_moments(model, tokens), probe_model(model, tokens))
    plan = calibrated.plan([attention_layers(model)[1].index])
    export_torch(model, tmp_path / "base" / "model.onnx", form=FORMS[form])
    rewrite_file(tmp_path / "base" / "model.onnx", plan, tmp_path / "model.onnx")
    assert linearized_layers(load_graph(tmp_path / "model.onnx")) == plan.chosen
    rows = [tokens[0][:11], tokens[1][:6]]
    stream = ort_stream(tmp_path / "model.onnx", 16)

    def logits(stream: object) -> np.ndarray:  # type: ignore[type-arg]
        steps = [stream.prefill(rows)]  # type: ignore[attr-defined]
        steps += [stream.decode([int(t[12 + i]) for t in tokens[:2]]) for i in range(STEPS)]  # type: ignore[attr-defined]
        return np.concatenate(steps)

    with linearized(model, plan):
        expected = logits(torch_stream(model, plan.chosen, form != "none"))
    original = logits(torch_stream(model, (), form != "none"))
    found = logits(stream)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)
    assert np.abs(original - expected).max() > 0.02  # the layer is missed


def test_each_expert_has_its_own_matrices(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_hidden_layers=2)
    graph = trace(model)
    stored = {name: value.const_value for name, value in graph.graph.initializers.items()}
    for layer, block in enumerate(model.model.layers):
        for expert, weight in enumerate(block.mlp.experts.gate_up_proj.numpy()):
            # As it is multiplied by: [inputs, outputs], read by a MatMul and by nothing else.
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj.{expert}"
            np.testing.assert_array_equal(stored[name].numpy(), weight.T)
            assert [n.op_type for n in readers(graph.graph.initializers[name])] == ["MatMul"]
    assert not [n for n, tensor in stored.items() if len(tensor.shape) > 2]
    save_graph(graph, tmp_path / "model.onnx")
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert 0.98 < (tmp_path / "model.onnx.data").stat().st_size / parameters < 1.02


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


NAMES = ("input_ids", "attention_mask", "position_ids")
OWN = ("tokens", "visible", "where")
ABSENT = Names(FLAT.past, lambda layer, side: f"out.{side}.{layer}")


@pytest.mark.parametrize(
    ("family", "tokens", "names"),
    [
        ("llama-gqa", OWN, NUMBERED),
        pytest.param("gpt2", OWN, ABSENT, marks=exhaustive),  # positions choose rows of a table
    ],
)
def test_every_layer(
    family: str,
    tokens: Sequence[str],
    names: Names,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    torchscript(names, tokens)(build(family, tmp_path / "model"), folder)
    case = calibrated_of(family)
    for k, chosen in CHOSEN.items():
        plan = case.plan(chosen)
        out, result = rewritten(folder, plan, tmp_path / k)
        assert result.before.kv_pairs - result.after.kv_pairs == len(plan.linear_attention)
        assert parity(case.model, plan, out / GRAPH).failures() == []
        graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
        assert [i.name for i in graph.input][:3] == list(tokens)
