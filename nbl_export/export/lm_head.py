"""Logits of the last positions only.

Generation needs no other logits, and in a prefill the others are a large share of the FLOPs: a vocabulary is many
times wider than a model. Only scoring a text needs them all, so their number is an input of the graph:

    num_logits_to_keep  int64 []   logits of that many last positions of the padded batch; 0 for all

Other tools use the same name. The input has a default, so a program that does not know it can leave it out:
for onnxruntime an input that is also an initializer is optional, for TensorRT it is a constant.

The default is all positions. onnxruntime-genai cannot set this input; it pads a batch on the right and selects the
last logits of each row itself. With the last position only, it would continue after the padding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.batch.names import ALL_LOGITS, NUM_LOGITS_TO_KEEP
from nbl_export.graph.io import external_files, int64_initializer, load_graph, save_again, save_graph
from nbl_export.graph.operators import is_constant, linear_op
from nbl_export.runtime.session import check_like

_DIMENSION = "num_logits"
# Elementwise operators that may follow the last product.
_ELEMENTWISE = frozenset({"Cast", "Identity", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"})


def add_num_logits_input(model: ir.Model) -> bool:
    """Add the optional input :data:`NUM_LOGITS_TO_KEEP` to the decoder graph; returns whether it has it now.

    The graph stays unchanged if the logits are not one product of states [batch, sequence, d] with a constant
    weight.
    """
    graph = model.graph
    if any(value.name == NUM_LOGITS_TO_KEEP for value in graph.inputs):
        return True
    logits, head = _head(model)
    states = head.inputs[0] if head is not None else None
    if logits is None or head is None or states is None or logits.shape is None or len(logits.shape) != 3:
        return False
    count = ir.Value(name=NUM_LOGITS_TO_KEEP, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    count.const_value = ir.tensor(np.array(ALL_LOGITS, dtype=np.int64), name=NUM_LOGITS_TO_KEEP)
    graph.inputs.append(count)
    flat, axis, end = (int64_initializer(graph, name, [n]) for name, n in _NUMBERS.items())
    # -0 is 0: a slice that starts there keeps all positions.
    negative = ir.node("Neg", [count])
    start = ir.node("Reshape", [negative.outputs[0], flat])
    last = ir.node("Slice", [states, start.outputs[0], end, axis], name="last_states")
    last.outputs[0].name = f"{states.name}.kept"
    last.outputs[0].type = states.type
    # The shape may be unknown; the product and the elementwise operators keep the rank.
    if states.shape is not None:
        last.outputs[0].shape = ir.Shape([states.shape[0], _DIMENSION, states.shape[2]])
    graph.insert_before(head, [negative, start, last])
    head.replace_input_with(0, last.outputs[0])
    for value in _elementwise_chain(logits, head):
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([value.shape[0], _DIMENSION, value.shape[2]])
    graph.register_initializer(count)
    return True


def add_num_logits_input_to_file(path: Path) -> list[Path]:
    """:func:`add_num_logits_input` for the graph at ``path``; returns the graph and its data files.

    External weights stay where they are; without any, those in the graph are moved to a data file.
    """
    check, model = check_like(path), load_graph(path)
    if sliced_lm_head(model) is None and add_num_logits_input(model):
        save = save_again if external_files(model) else save_graph
        return save(model, path, check)
    return [path, *external_files(model)]


def sliced_lm_head(model: ir.Model) -> ir.Node | None:
    """The product that computes the logits of a graph with the input :data:`NUM_LOGITS_TO_KEEP`, or None."""
    known = any(value.name == NUM_LOGITS_TO_KEEP for value in model.graph.inputs)
    return _head(model)[1] if known else None


_NUMBERS = {"num_logits.flat": -1, "num_logits.axis": 1, "num_logits.end": np.iinfo(np.int64).max}


def _head(model: ir.Model) -> tuple[ir.Value | None, ir.Node | None]:
    """The logits, and the product that computes them."""
    logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
    chain = _elementwise_chain(logits, None)
    node = chain[-1].producer() if chain else None
    return logits, node if node is not None and linear_op(node) is not None else None


def _elementwise_chain(logits: ir.Value | None, head: ir.Node | None) -> list[ir.Value]:
    """The logits and the elementwise chain before them, back to the output of the last other operator."""
    found: list[ir.Value] = []
    value = logits
    while value is not None:
        found.append(value)
        node = value.producer()
        if node is None or node is head or node.op_type not in _ELEMENTWISE:
            break
        moving = [v for v in node.inputs if v is not None and not is_constant(v)]
        value = moving[0] if len(moving) == 1 else None
    return found
