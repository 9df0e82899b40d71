"""MLPs of a plan in a graph: replaced as they are proven, and refused where anything is another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from nbl_export.blocks import PARTS, Block, Mlp
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.probe import probe_model
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import kv_layers
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite import planned
from nbl_export.rewrite.confirm import check_layers
from nbl_export.rewrite.planned import check_finite
from nbl_export.rewrite.replace import linearized_layers, rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import gates_for
from tests.families import Calibrated
from tests.fixtures_graph import ragged_rows

MIXED: tuple[Block, ...] = (0, Mlp(0), Mlp(2), 3)


@pytest.fixture(scope="module")
def case(tiny_model: Any) -> Calibrated:
    vocab = tiny_model.config.vocab_size
    tokens = np.random.default_rng(0).integers(3, vocab, (64, 32), dtype=np.int32)
    return Calibrated(
        tiny_model, collect_moments(tiny_model, tokens, parts=PARTS), probe_model(tiny_model, tokens, PARTS)
    )


@pytest.fixture(scope="module")
def plan(case: Calibrated) -> Plan:
    return case.plan(MIXED)


def failures(model: Any, plan: Plan, graph: Path) -> Sequence[str]:
    rows = ragged_rows((9, 5, 7), model.config.vocab_size)
    with linearized(model, plan):
        reference = PastStream(TorchDecoder(model, plan.linear_attention))
        return compare_streams(reference, ort_stream(graph, 16), rows, 2, gates_for("float32")).failures()


def test_attentions_and_mlps_become_linear_and_nothing_else_changes(
    tiny_graph: Path, case: Calibrated, plan: Plan, tmp_path: Path
) -> None:
    target = tmp_path / "model.onnx"
    result = rewrite_file(tiny_graph, plan, target)
    graph = load_graph(target)
    assert linearized_layers(graph) == MIXED
    assert kv_layers(graph) == plan.attention_layers == (1, 2), "an MLP has no keys and values"
    assert result.before.kv_pairs - result.after.kv_pairs == 2
    assert failures(case.model, plan, target) == []
    # Weights of both, W and b in their place; norms stay.
    d, inner = case.model.config.hidden_size, case.model.config.intermediate_size
    attention = sum(p.numel() for p in case.model.model.layers[0].self_attn.parameters())
    gone = 2 * attention + 2 * 3 * d * inner - 4 * (d * d + d)
    assert result.before.parameters - result.after.parameters == gone
    left = [name for name in graph.graph.initializers if "layers.0.mlp." in name and "nbl_linear" not in name]
    assert left == []


def swapped(plan: Plan, name: str, a: Block, b: Block) -> Plan:
    values = dict(getattr(plan, name))
    values[a], values[b] = values[b], values[a]
    return replace(plan, **{name: values})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan: swapped(
            swapped(plan, "probe_u", Mlp(0), Mlp(1)), "probe_y", Mlp(0), Mlp(1)
        ),  # its neighbour's
        lambda plan: swapped(plan, "probe_y", Mlp(0), 0),  # the attention's output
        lambda plan: replace(plan, probe_y={**plan.probe_y, Mlp(0): plan.probe_y[Mlp(0)] * 1.01}),
        lambda plan: replace(plan, probe_u={**plan.probe_u, Mlp(0): plan.probe_u[Mlp(0)] * 1.01}),
    ],
)
def test_an_mlp_that_is_not_proven_is_not_replaced(
    tiny_graph: Path, plan: Plan, tmp_path: Path, wrong: Any
) -> None:
    with pytest.raises(BuildError, match="not proven"):
        rewrite_file(tiny_graph, wrong(plan), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(("name", "change"), [("weight", 1.01), ("bias", 0.0)])
def test_another_w_or_b_in_the_place_of_an_mlp_is_noticed(
    tiny_graph: Path, plan: Plan, tmp_path: Path, name: str, change: float
) -> None:
    target = tmp_path / "model.onnx"
    proofs = rewrite_file(tiny_graph, plan, target).proofs
    assert not [check.failure for check in check_layers(target, proofs, plan) if check.failure]
    model = onnx.load(str(target))
    (tensor,) = [
        t
        for t in model.graph.initializer
        if t.name == f"layers.2.mlp.nbl_linear.{name}"
        or (name == "weight" and t.name.startswith("layers.2.mlp.nbl_linear.") and len(t.dims) == 2)
    ]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(change), tensor.name))
    onnx.save_model(model, str(tmp_path / "changed.onnx"))
    bad = [check.layer for check in check_layers(tmp_path / "changed.onnx", proofs, plan) if check.failure]
    assert bad == [Mlp(2)]


# weights that are no numbers ---------------------------------------------------------------------

KINDS = {
    "fp32": (ir.DataType.FLOAT, np.float32),
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}


def graph_with(op: str, kind: str, bad: float) -> ir.Model:
    """x ─► op ─► y with a constant of 2 × 3, one of whose numbers is ``bad``."""
    dtype, numpy = KINDS[kind]
    array = np.ones((2, 3), dtype=numpy)
    array[1, 2] = bad
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, ["x", "c"], ["y"], name="reader")],
            "g",
            [helper.make_tensor_value_info("x", int(dtype), [3, 2])],
            [helper.make_tensor_value_info("y", int(dtype), None)],
            [],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    graph = ir.from_proto(proto)
    value = ir.Value(
        name="c",
        const_value=ir.tensor(array, dtype=dtype, name="c"),
        type=ir.TensorType(dtype),
        shape=ir.Shape([2, 3]),
    )
    node = graph.graph[0]
    graph.graph.register_initializer(value)
    node.replace_input_with(1, value)
    return graph


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "_PART", 4)
    for op, bad, words in (
        ("MatMul", np.nan, "NaN"),
        ("MatMul", np.inf, "infinite"),
        ("Add", np.nan, "NaN"),
    ):
        with pytest.raises(InputError, match=f"it cannot be used: its weight c is {words} at 1 of 6 places"):
            check_finite(graph_with(op, kind, bad), "it")
    check_finite(graph_with("Add", kind, -np.inf), "it")  # a mask
    check_finite(graph_with("MatMul", kind, float(ml_dtypes.finfo(KINDS[kind][1]).max)), "it")
