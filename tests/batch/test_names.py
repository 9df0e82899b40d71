"""The names of inputs, outputs and dimensions are those that a written graph has, read by onnx alone."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from nbl_export.batch import names


@pytest.fixture(scope="module")
def proto(tiny_graph: Path) -> onnx.ModelProto:
    return onnx.load(str(tiny_graph), load_external_data=False)


def dims(value: onnx.ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def test_inputs_of_a_decoder_have_these_names_and_dimensions(proto: onnx.ModelProto) -> None:
    found = {value.name: dims(value) for value in proto.graph.input}
    past = {
        names.past_name(i, side): (names.BATCH, 2, names.PAST, 8) for i in range(4) for side in names.SIDES
    }
    tokens = dict.fromkeys((names.TOKENS, names.POSITIONS), (names.BATCH, names.SEQUENCE))
    others = {names.MASK: (names.BATCH, names.TOTAL), names.NUM_LOGITS_TO_KEEP: ()}
    assert found == {**tokens, **others, **past}


def test_outputs_of_a_decoder_have_these_names(proto: onnx.ModelProto) -> None:
    present = [names.present_name(i, side) for i in range(4) for side in names.SIDES]
    assert {value.name for value in proto.graph.output} == {"logits", *present}
