"""KV caches: paired by name, removed and renumbered; states beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import kv_pairs, state_pairs
from nbl_export.rewrite.leave_out import remove_pairs
from tests.sessions import cpu_session

SIDES = ("key", "value")
HEADS, DIM = 3, 2
PAST, NEW, BATCH = 5, 4, 2


def cache_graph(
    layers: int,
    questions: dict[str, tuple[str, dict[str, int]]] | None = None,
    extra: list[onnx.NodeProto] | None = None,
    without: tuple[str, ...] = (),
) -> ir.Model:
    """A graph whose layer i appends the number 10 i (key) or 10 i + 1 (value) to its past.

    ``questions`` are outputs: each the Shape of a tensor with the attributes given, as float.
    """
    questions = questions or {}
    inputs, outputs, nodes, constants = [], [], [], []
    inputs += [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "new"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    nodes.append(helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT))
    outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "new"]))
    for layer in range(layers):
        for side, name in enumerate(SIDES):
            past, present = f"past_key_values.{layer}.{name}", f"present.{layer}.{name}"
            shape = ["batch", HEADS, "past", DIM]
            inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, shape))
            number = np.full((BATCH, HEADS, 1, DIM), 10 * layer + side, dtype=np.float32)
            constants.append(numpy_helper.from_array(number, f"new.{layer}.{name}"))
            nodes.append(helper.make_node("Concat", [past, f"new.{layer}.{name}"], [present], axis=2))
            shape = ["batch", HEADS, "total", DIM]
            outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, shape))
    for name, (tensor, attributes) in questions.items():
        nodes.append(helper.make_node("Shape", [tensor], [f"{name}.shape"], **attributes))
        nodes.append(helper.make_node("Cast", [f"{name}.shape"], [name], to=TensorProto.FLOAT))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]))
    nodes += extra or []
    graph = helper.make_graph(
        nodes,
        "cache",
        [v for v in inputs if v.name not in without],
        [v for v in outputs if v.name not in without],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = cpu_session(proto)
    names = [i.name for i in session.get_inputs()]
    assert set(names) <= set(feeds)
    wanted = [o.name for o in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, {n: feeds[n] for n in names}), strict=True))


def feeds(layers: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    past = {
        f"past_key_values.{i}.{s}": generator.standard_normal((BATCH, HEADS, PAST, DIM)).astype(np.float32)
        for i in range(layers)
        for s in SIDES
    }
    ids = np.arange(BATCH * NEW, dtype=np.int64).reshape(BATCH, NEW)
    return {"input_ids": ids, "attention_mask": np.ones((BATCH, PAST + NEW), np.int64), **past}


def test_pairs_come_by_index_with_key_before_value() -> None:
    model = cache_graph(12)
    # The order of inputs and outputs is the file's, not ours to rely on.
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    model.graph.inputs.clear()
    model.graph.inputs.extend(reversed(inputs))
    model.graph.outputs.clear()
    model.graph.outputs.extend(reversed(outputs))
    pairs = kv_pairs(model)
    assert [p.index for p in pairs] == list(range(12))
    for pair in pairs:
        assert [v.name for v in pair.past] == [f"past_key_values.{pair.index}.{s}" for s in SIDES]
        assert [v.name for v in pair.present] == [f"present.{pair.index}.{s}" for s in SIDES]


@pytest.mark.parametrize(
    "missing",
    ["past_key_values.1.key", "past_key_values.1.value", "present.1.key", "present.1.value"],
)
def test_incomplete_pairs_are_refused(missing: str) -> None:
    with pytest.raises(InputError, match="KV cache 1 is incomplete"):
        kv_pairs(cache_graph(3, without=(missing,)))


@pytest.mark.parametrize("removed", [(), (0,), (11,), (0, 3, 10), (4, 5), tuple(range(12))])
def test_the_rest_is_renumbered_in_order(removed: tuple[int, ...]) -> None:
    model = cache_graph(12)
    remove_pairs(model, removed, kv_pairs(model))
    kept = [i for i in range(12) if i not in removed]
    names = [f"past_key_values.{n}.{s}" for n in range(len(kept)) for s in SIDES]
    assert [v.name for v in model.graph.inputs] == ["input_ids", "attention_mask", *names]
    given = feeds(len(kept))
    result = run(model, given)
    assert set(result) == {"logits", *(n.replace("past_key_values", "present") for n in names)}
    # Which layer a pair is of shows in the number that it appends.
    for new, old in enumerate(kept):
        for side, name in enumerate(SIDES):
            present = result[f"present.{new}.{name}"]
            assert np.array_equal(present[:, :, :PAST], given[f"past_key_values.{new}.{name}"])
            assert np.array_equal(np.unique(present[:, :, PAST:]), [10 * old + side])


QUESTIONS = {
    "length": {"start": 2, "end": 3},
    "batch": {"start": 0, "end": 1},
    "heads": {"start": 1, "end": 2},
    "all": {},
    "from the length": {"start": 2},
    "up to the heads": {"end": 2},
    "counted from the end": {"start": -2, "end": -1},
}
ANSWERS = {
    "length": [PAST],
    "batch": [BATCH],
    "heads": [HEADS],
    "all": [BATCH, HEADS, PAST, DIM],
    "from the length": [PAST, DIM],
    "up to the heads": [BATCH, HEADS],
    "counted from the end": [PAST],
}


@pytest.mark.parametrize("removed", [(0,), (0, 1)], ids=["a twin is kept", "no cache is left"])
@pytest.mark.parametrize("side", SIDES)
def test_questions_for_the_past_length_are_answered_without_it(removed: tuple[int, ...], side: str) -> None:
    questions = {name: (f"past_key_values.0.{side}", attributes) for name, attributes in QUESTIONS.items()}
    model = cache_graph(2, questions)
    before = run(model, feeds(2))
    remove_pairs(model, removed, kv_pairs(model))
    assert [v.name for v in model.graph.inputs][2:] == [
        f"past_key_values.0.{s}" for s in SIDES if len(removed) == 1
    ]
    after = run(model, feeds(2))
    for name, expected in ANSWERS.items():
        assert before[name].tolist() == after[name].tolist() == expected, name


def test_a_past_that_is_still_read_is_an_error_naming_the_reader() -> None:
    reader = helper.make_node("Relu", ["past_key_values.1.key"], ["kept"], name="the_reader")
    model = cache_graph(2, extra=[reader])
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "kept"))
    with pytest.raises(BuildError, match=r"past_key_values\.1\.key cannot be removed: a Relu \(the_reader\)"):
        remove_pairs(model, (1,), kv_pairs(model))


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
