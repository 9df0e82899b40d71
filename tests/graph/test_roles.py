"""What the inputs of a graph mean, by name or by what reads them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from nbl_export.graph.roles import INPUTS_KEY, remember_roles, roles

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
