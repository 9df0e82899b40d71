"""Weights as integers: the graph computes with the numbers that these stand for, and nothing else has changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import InputError
from nbl_export.export.experts import MOE, check_precision
from nbl_export.export.forms import NONE
from nbl_export.export.torch import trace
from nbl_export.graph.integers import quantize_blocks, to_integers
from nbl_export.graph.operators import linear_op, routed, weight_bits
from nbl_export.graph.precision import graph_precision
from nbl_export.runtime.intermediates import compute_tensors
from tests.graph.by_hand import parsed
from tests.tiny_types import tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
FEW = {"num_experts": 20, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


def rows(length: int = 12) -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(0, 250, (2, length))
    return [
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(length), ids.shape).copy(),
        }
    ]


def logits(graph: ir.Model) -> Any:
    return compute_tensors(graph, ["logits"], rows())[0]["logits"]


def round_weights(graph: ir.Model, like: ir.Model, bits: int) -> None:
    """Give the weights of a float32 graph the numbers that those of ``like``, which has the same nodes, stand for."""
    kept = {node.name for node in like.graph if node.op_type in ("MatMul", "Gemm")}
    for node in graph.graph:
        stacks = (2, 4) if node.op_type == "MoE" else ()
        for index in stacks or ((1,) if linear_op(node) and node.name not in kept else ()):
            value = node.inputs[index]
            assert value is not None and value.const_value is not None
            array = value.const_value.numpy()
            turned = array if stacks else array.T
            blocks = quantize_blocks(
                turned.reshape(-1, turned.shape[-1]), bits, 32, symmetric=True, positive=True
            )
            numbers = blocks.values().reshape(turned.shape)
            value.const_value = ir.tensor(
                np.ascontiguousarray(numbers if stacks else numbers.T), name=value.name
            )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2"])
def test_a_graph_computes_with_what_its_integers_stand_for(kind: str, bits: int) -> None:
    sizes = {**SIZES, **FEW} if kind == "qwen3_moe" else {"n_embd": 64, "n_layer": 1, "n_head": 4}
    graph = trace(tiny_model(kind, **sizes), replace(NONE, experts=MOE))
    exact, expected = graph.clone(), graph.clone()
    to_integers(graph, bits)
    assert "MoE" not in {node.op_type for node in graph.graph}
    # The router chooses by what it has scored, and stays.
    floats = [node for node in graph.graph if linear_op(node) and not weight_bits(node)]
    assert len(floats) == (kind == "qwen3_moe") and graph_precision(graph).name == f"int{bits}"
    round_weights(expected, graph, bits)
    for node in graph.graph:
        if node.op_type == "MatMulNBits":  # so that activations are not rounded
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    found, size = logits(graph), logits(exact).std()
    assert np.abs(found - logits(expected)).max() < 1e-3 * size < np.abs(found - logits(exact)).max()


def test_a_weight_behind_a_transpose_is_stored_as_integers_alone() -> None:
    text = "g (float[a,64] x) => (float[a,32] y) { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"
    graph = parsed(text, w=np.ones((32, 64), np.float32))
    to_integers(graph, 4)
    assert [node.op_type for node in graph.graph] == ["MatMulNBits"]
    assert list(graph.graph.initializers) == ["w.rows.int4", "w.rows.int4.scales"]


def test_experts_of_four_bits_count_as_many_weights_as_before() -> None:
    model = tiny_model("qwen3_moe", **SIZES, **FEW)
    graph = trace(model, replace(NONE, experts=MOE))
    before = [one for node in graph.graph if (one := routed(node))]
    to_integers(graph, 4)
    (after,) = (one for node in graph.graph if (one := routed(node)))
    assert [one.parameters for one in before] == [after.parameters] and after.share == before[0].share
    assert 4 * after.bytes < before[0].bytes


def test_experts_without_whole_blocks_or_of_another_gate_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"Qwen3MoeExperts multiplies by .* no whole blocks of 32 .* use fp16"
    ):
        check_precision(tiny_model("qwen3_moe", **{**SIZES, **FEW, "moe_intermediate_size": 16}), "int8")
    gated = {"enable_moe_block": True, "num_experts": 20, "top_k_experts": 2, "moe_intermediate_size": 32}
    with pytest.raises(
        InputError, match=r"Gemma4TextExperts is not gated as SwiGLU, .* of --precision int4: use fp16"
    ):
        check_precision(tiny_model("gemma4_text", **gated), "int4")
    check_precision(tiny_model("gemma4_text", **{**gated, "num_experts": 4}), "int4")
