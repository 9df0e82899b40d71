"""What a decoder graph takes and gives, by role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.errors import InputError
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import load_graph
from nbl_export.graph.roles import INPUTS_KEY, remember_roles, roles

MS = "com.microsoft"


def info(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def grouped(
    names: tuple[str, ...] = ("past_key_values.0.key", "past_key_values.0.value"),
    outputs: tuple[str, ...] = ("present.0.key", "present.0.value"),
    packed: bool = True,
    inputs: tuple[str, ...] = (),
) -> ir.Model:
    """One GroupQueryAttention of 4 heads of 16 over 2, whose cache does not say how large a head is."""
    width = 16 * (4 + 2 * 2)
    weights = {
        "w": np.zeros((8, width), np.float32),
        "k": np.zeros((8, 32), np.float32),
        "o": np.zeros((64, 5), np.float32),
        "e": np.zeros((9, 8), np.float32),
        "lengths": np.zeros(1, np.int32),
        "total": np.int32(1),
    }
    query, keys, values = ("qkv", "", "") if packed else ("q4", "k", "k2")
    weights["q"] = np.zeros((8, 64), np.float32)
    nodes = [
        helper.make_node("Gather", ["e", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w" if packed else "q"], [query]),
        *(helper.make_node("MatMul", ["x", "k"], [name]) for name in (keys, values) if name),
        helper.make_node(
            "GroupQueryAttention",
            [query, keys, values, *names, "lengths", "total"],
            ["a", *outputs],
            domain=MS,
            num_heads=4,
            kv_num_heads=2,
        ),
        helper.make_node("MatMul", ["a", "o"], ["scores"]),
    ]
    if not packed:
        weights["key"] = weights.pop("k")
        for node in nodes[2:4]:
            node.input[1] = "key"
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [
                info("input_ids", "b", "s", kind=TensorProto.INT64),
                *(info(name, "b", "h", "p", "d") for name in names),
                *(info(name, kind=TensorProto.INT64) for name in inputs),
            ],
            [*(info(name, "b", 2, "t", "d") for name in outputs), info("scores", "b", "s", 5)],
            [numpy_helper.from_array(v, n) for n, v in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)],
        ir_version=10,
    )
    return ir.from_proto(proto)


def test_our_own_graph(tiny_graph: Path) -> None:
    found = interface_of(load_graph(tiny_graph))
    assert found.inputs >= {"input_ids", "attention_mask", "position_ids"}
    assert (found.logits, found.static, found.ragged, found.cacheless) == ("logits", False, False, False)
    assert found.layers == (0, 1, 2, 3) and {(e.heads, e.sizes) for e in found.cache} == {(2, (8, 8))}
    row = found.row(np.array([5, 6, 7]), np.float32)
    assert set(row) == found.inputs
    assert row["position_ids"].tolist() == [[0, 1, 2]] and row["attention_mask"].tolist() == [[1, 1, 1]]
    assert row["past_key_values.3.value"].shape == (1, 2, 0, 8)


@pytest.mark.parametrize("packed", [True, False])
def test_the_head_size_of_a_fused_attention_comes_from_its_projections(packed: bool) -> None:
    found = interface_of(grouped(packed=packed))
    assert [(e.heads, e.sizes) for e in found.cache] == [(2, (16, 16))]
    assert found.ragged and found.logits == "scores"


def test_a_cache_of_other_names_is_seen_by_what_is_done_with_it() -> None:
    found = interface_of(grouped(("v_in", "k_in"), ("v_out", "k_out")))
    # The operator says which is the key, not the name.
    assert [(e.past, e.present) for e in found.cache] == [(("v_in", "k_in"), ("v_out", "k_out"))]
    assert found.past_names == ["v_in", "k_in"] and found.present_names == ["v_out", "k_out"]


def test_an_input_of_unknown_meaning_is_named() -> None:
    with pytest.raises(
        InputError, match=r"has an input 'input_features' that nbl-export does not know"
    ) as told:
        interface_of(grouped(inputs=("input_features",)))
    assert "\n" not in str(told.value)


def test_a_cache_that_says_nothing_of_its_heads_is_refused(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            value.shape = ir.Shape([None, None, None, None])
    with pytest.raises(
        InputError, match=r"number of heads and the head_dim of past_key_values\.0\.key are unknown"
    ):
        interface_of(model)


GRAPH = """
<ir_version: 10, opset_import: ["" : 17]>
g (int64[b, s] {tokens}, int64[b, t] {mask}, int64[b, s] {positions}) => (float[b, s, 4] y)
<float[50, 4] words = {{}}, float[9, 4] places = {{}}>
{{
  e = Gather (words, {tokens})
  {table}
  seen = Cast <to = 1> ({mask})
  total = ReduceSum <keepdims = 0> (seen)
  x = Add (e, p)
  y = Mul (x, total)
}}
"""
TABLE = "p = Gather (places, {positions})"
ROTARY = "f = Cast <to = 1> ({positions})  c = Cos (f)  one = Constant <value_ints = [2]> ()  p = Unsqueeze (c, one)"
OWN = {"tokens": "a", "mask": "b_", "positions": "c_"}
MEANING = {"input_ids": "a", "attention_mask": "b_", "position_ids": "c_"}


def graph(table: str, names: dict[str, str]) -> ir.Model:
    text = GRAPH.format(**names, table=table.format(**names))
    text = text.replace("words = {}", f"words = {{{', '.join(['0.5'] * 200)}}}")
    return ir.from_onnx_text(text.replace("places = {}", f"places = {{{', '.join(['0.5'] * 36)}}}"))


def meaning(model: ir.Model) -> dict[str, str]:
    return {name: str(value.name) for name, value in roles(model).items()}


@pytest.mark.parametrize("table", [TABLE, ROTARY])
def test_names_of_their_own_are_found_by_structure(table: str) -> None:
    assert meaning(graph(table, OWN)) == MEANING
    usual = {"tokens": "input_ids", "mask": "attention_mask", "positions": "position_ids"}
    model = graph(table, usual)
    assert meaning(model) == {name: name for name in usual.values()}
    remember_roles(model)
    assert INPUTS_KEY not in model.metadata_props


def test_what_a_rewrite_removes_is_remembered() -> None:
    model = graph(TABLE, OWN)
    remember_roles(model)
    for node in list(model.graph):
        if node.inputs and node.inputs[-1] is not None and node.inputs[-1].name == "c_":
            node.replace_input_with(1, model.graph.inputs[0])
    assert meaning(model) == MEANING
    del model.metadata_props[INPUTS_KEY]
    assert "position_ids" not in meaning(model)
