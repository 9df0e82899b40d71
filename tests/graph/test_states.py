"""States of a graph, by the names and shapes of its inputs and outputs."""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.graph.cache import state_pairs


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def graph(inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    return ir.Model(ir.Graph(inputs, outputs, nodes=[], opset_imports={"": 23}), ir_version=10)


def test_a_state_is_an_input_and_an_output_of_one_name_of_which_the_batch_alone_is_open() -> None:
    inputs = [
        value("input_ids", "batch", "sequence"),
        value("past.0.conv", "batch", 32, 3),
        value("past_recurrent.0", "batch", 4, 8, 8),
        value("past_key_values.1.key", "batch", 2, "past", 8),
        value("past.2.conv", "batch", 32, 3),  # no output
    ]
    outputs = [
        value("logits", "batch", "sequence", 260),
        value("present.0.conv", "batch", 32, 3),
        value("present_recurrent.0", "batch", 4, 8, 8),
        value("present_key_values.1.key", "batch", 2, "total", 8),
    ]
    found = state_pairs(graph(inputs, outputs))
    assert [(p.past.name, p.present.name, p.shape) for p in found] == [
        ("past.0.conv", "present.0.conv", (32, 3)),
        ("past_recurrent.0", "present_recurrent.0", (4, 8, 8)),
    ]


def test_what_grows_is_no_state() -> None:
    grown = graph(
        [value("past.0.key", "batch", 2, "past", 8)], [value("present.0.key", "batch", 2, "total", 8)]
    )
    assert state_pairs(grown) == ()
