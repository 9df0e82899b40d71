"""Wrong linearized graphs: one thing is wrong in one layer, as a bug of the rewrite would make it.

Of W and b: the graph is rewritten by a plan that is wrong. Of anything else: the right graph is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.graph.cache import LAYERS_KEY, kv_pairs
from nbl_export.graph.io import follow_links, load_graph
from nbl_export.graph.operators import infer_types
from nbl_export.linearize.plan import LinearLayer, Plan, linear_output_name
from nbl_export.rewrite.confirm import linear_part

WrongPlan = Callable[[Plan, int], Plan]
Change = Callable[[ir.Model, int], None]


def _with(plan: Plan, layer: int, linear: LinearLayer) -> Plan:
    return replace(plan, layers={**dict(plan.layers), layer: linear})


def scaled(w: float, b: float) -> WrongPlan:
    def wrong(plan: Plan, layer: int) -> Plan:
        linear = plan.layers[layer]
        return _with(plan, layer, LinearLayer(linear.w * np.float32(w), linear.b * np.float32(b)))

    return wrong


def transposed(plan: Plan, layer: int) -> Plan:
    linear = plan.layers[layer]
    return _with(plan, layer, LinearLayer(np.ascontiguousarray(linear.w.T), linear.b))


def of_another_layer(plan: Plan, layer: int) -> Plan:
    other = next(i for i in reversed(plan.chosen) if i != layer)
    return _with(plan, layer, LinearLayer(plan.layers[other].w, plan.layers[layer].b))


def one_row_twice(plan: Plan, layer: int) -> Plan:
    """One output channel gets the weights of its neighbour."""
    linear = plan.layers[layer]
    w = linear.w.copy()
    w[7] = w[8]
    return _with(plan, layer, LinearLayer(w, linear.b))


OF_WEIGHTS: Mapping[str, WrongPlan] = {
    "W and b × 0.3": scaled(0.3, 0.3),
    "W × 0.3": scaled(0.3, 1),
    "W × 0.8": scaled(0.8, 1),
    "W × 1.1": scaled(1.1, 1),
    "b dropped": scaled(1, 0),
    "b × 0.8": scaled(1, 0.8),
    "another layer's W": of_another_layer,
    "W transposed": transposed,
    "one row of W twice": one_row_twice,
}


# the graph ---------------------------------------------------------------------------------------


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def _constant(model: ir.Model, name: str, number: float, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.array(number, dtype=dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape([]))
    model.graph.register_initializer(value)
    return value


def _between(model: ir.Model, value: ir.Value, op: str, other: ir.Value, only: ir.Node | None = None) -> None:
    """What reads ``value`` (or ``only`` that node) reads the result of ``op`` of it and ``other`` instead."""
    readers = [use for use in value.uses() if only is None or use.node is only]
    node = ir.node(op, [value, other])
    node.outputs[0].name = f"{value.name}.wrong"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    model.graph.append(node)
    for use in readers:
        use.node.replace_input_with(use.idx, node.outputs[0])


def left_out(model: ir.Model, layer: int) -> None:
    """The residual stream passes the layer by: what it adds is zero."""
    output = _value(model, linear_output_name(layer))
    _between(model, output, "Sub", output)


def added_twice(model: ir.Model, layer: int) -> None:
    output = _value(model, linear_output_name(layer))
    _between(model, output, "Add", output)


def of_another_input(model: ir.Model, layer: int) -> None:
    """The layer reads what the layer before it reads."""
    rows = json.loads(model.metadata_props[LAYERS_KEY])
    other = next(r["input"] for r in rows if r["layer"] == layer - 1)
    part = linear_part(model, layer)
    assert not isinstance(part, str)
    for node in part.nodes:
        for index, value in enumerate(node.inputs):
            if value is part.reads:
                node.replace_input_with(index, _value(model, other))


def _exchange(model: ir.Model, one: ir.Value, two: ir.Value) -> None:
    """Two outputs of the graph take each other's name and place."""
    outputs = model.graph.outputs
    i, j = outputs.index(one), outputs.index(two)
    outputs[i], outputs[j] = two, one
    one.name, two.name = two.name, one.name


def pairs_swapped(model: ir.Model, number: int) -> None:
    """Two layers write their keys and values where the other's are read."""
    pairs = kv_pairs(model)
    for one, two in zip(pairs[number].present, pairs[(number + 1) % len(pairs)].present, strict=True):
        _exchange(model, one, two)


def sides_swapped(model: ir.Model, number: int) -> None:
    """Keys are written where values are read."""
    _exchange(model, *kv_pairs(model)[number].present)


def rotary_off(model: ir.Model, number: int) -> None:
    """One layer's keys are turned by another table: its cosines are a tenth too small."""
    rotary = [n for n in model.graph if n.op_type == "RotaryEmbedding"]
    node = rotary[2 * number + 1]
    table = node.inputs[1]
    assert table is not None
    off = _constant(model, f"off.{number}", 0.9, table.dtype or ir.DataType.FLOAT)
    _between(model, table, "Mul", off, only=node)


def position_off_by_one(model: ir.Model, _number: int) -> None:
    positions = next(v for v in model.graph.inputs if v.name == "position_ids")
    _between(model, positions, "Add", _constant(model, "one", 1, ir.DataType.INT64))


def retained_larger(model: ir.Model, number: int) -> None:
    """What one retained attention writes is a little too large."""
    y = [n for n in model.graph if n.op_type == "Attention"][number].outputs[0]
    _between(model, y, "Mul", _constant(model, f"more.{number}", 1.1, y.dtype or ir.DataType.FLOAT))


# Of one linear layer.
OF_LAYERS: Mapping[str, Change] = {
    "layer left out": left_out,
    "layer added twice": added_twice,
    "the u of the layer before": of_another_input,
}
# Of the n-th layer that keeps its attention.
OF_RETAINED: Mapping[str, Change] = {
    "KV pairs swapped": pairs_swapped,
    "keys and values swapped": sides_swapped,
    "one rotary table off": rotary_off,
    "a retained attention × 1.1": retained_larger,
}
OF_ALL: Mapping[str, Change] = {"position off by one": position_off_by_one}


def changed(path: Path, change: Change, number: int, target: Path) -> Path:
    """The graph at ``path`` with one ``change``, written to ``target`` beside the data that it shares."""
    model = load_graph(path)
    infer_types(model)
    change(model, number)
    model.graph.sort()
    follow_links(model)
    ir.save(model, target, format="protobuf")
    return target
