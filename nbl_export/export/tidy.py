"""Make a graph of torch.onnx readable: public names and dimensions, weights stored once and read when it is written.

A model is traced with tensors that stand for its weights (:func:`nbl_export.models.weights.standing_in`). What the
exporter makes of one, as a transposed matrix or one of a stack, is a view of it: the place in memory says of which
weight, offset and strides say of what part. So the graph gets a tensor that makes the same view of the weight itself.

Generation needs the logits of the last position only, and in a prefill the others are a large share of the FLOPs: a
vocabulary is many times wider than a model. Only scoring a text needs them all, so their number is an input of the
graph:

    num_logits_to_keep  int64 []   logits of that many last positions of the padded batch; 0 for all

Other tools use the same name. The input has a default, so a program that does not know it can leave it out:
for onnxruntime an input that is also an initializer is optional, for TensorRT it is a constant.

The default is all positions. onnxruntime-genai cannot set this input; it pads a batch on the right and selects the
last logits of each row itself. With the last position only, it would continue after the padding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export import __version__
from nbl_export.batch import (
    ALL_LOGITS,
    BATCH,
    NUM_LOGITS_TO_KEEP,
    SIDES,
    WRITE_INDICES,
)
from nbl_export.errors import BuildError
from nbl_export.export.forms import ENCODER, Form
from nbl_export.export.recurrence import SYMBOLIC_DOMAIN
from nbl_export.export.scans import make_scans
from nbl_export.export.traced_experts import EXPERTS
from nbl_export.graph.io import external_files, int64_initializer, load_graph, save_again, save_graph
from nbl_export.graph.operators import is_constant, linear_op, remove_unused
from nbl_export.models.dummy_run import BlockCache
from nbl_export.models.weights import Weight
from nbl_export.runtime.session import check_like

_SCOPES = "pkg.torch.onnx.name_scopes"
_DIMENSION = "num_logits"
# Elementwise operators that may follow the last product.
_ELEMENTWISE = frozenset({"Cast", "Identity", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"})
_NUMBERS = {"num_logits.flat": -1, "num_logits.axis": 1, "num_logits.end": np.iinfo(np.int64).max}


class StandIns:
    """The tensors that stand for weights in a graph that is being made."""

    def __init__(self, stand_ins: Sequence[Weight]) -> None:
        self._all = [(one.tensor.data_ptr(), one) for one in stand_ins if one.tensor is not None]

    def attach(self, graph: ir.Graph, used: Collection[str]) -> bool:
        """Give the initializers of ``graph`` the weights; whether all that are ``used`` are there.

        One that is not may have been computed with, so the graph is of no use.
        """
        found: set[str] = set()
        for value in graph.initializers.values():
            if value.const_value is not None and (part := self._part(value.const_value.numpy())):
                found.add(part[0].name)
                value.const_value = _view(*part, value.const_value)
        return found >= {stand_in.name for _, stand_in in self._all}.intersection(used)

    def equal(self, a: NDArray[Any], b: NDArray[Any]) -> bool:
        """Whether two arrays have equal numbers; what stands for a weight has those of the weight."""
        ours, theirs = self._part(a), self._part(b)
        if ours is None and theirs is None:
            return np.array_equal(a, b)
        if ours is None or theirs is None or (ours[1], a.shape, a.strides) != (theirs[1], b.shape, b.strides):
            return False
        return ours[0] is theirs[0] or torch.equal(ours[0].read(), theirs[0].read())

    def _part(self, array: NDArray[Any]) -> tuple[Weight, int] | None:
        """The stand-in that ``array`` is a view of, and the offset in bytes; None for any other array."""
        address = array.__array_interface__["data"][0]
        for start, stand_in in self._all:
            if start <= address < start + stand_in.empty.nbytes:
                return stand_in, address - start
        return None


def _view(stand_in: Weight, offset: int, tensor: ir.TensorProtocol) -> ir.LazyTensor:
    array = tensor.numpy()
    shape, strides, name = array.shape, array.strides, tensor.name

    def make() -> ir.TensorProtocol:
        whole = stand_in.value().contiguous().cpu().numpy()
        flat = whole.reshape(-1).view(np.uint8)[offset:].view(whole.dtype)
        return ir.tensor(np.lib.stride_tricks.as_strided(flat, shape, strides), name=name)

    # onnx_ir's annotation asks for a class of its own, its code for the protocol.
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)  # type: ignore[arg-type]


def tidy(
    model: ir.Model, form: Form, blocks: Sequence[BlockCache], stand_ins: StandIns | None = None
) -> ir.Model:
    """Set public names and dimensions, share common subexpressions, and remove torch's own metadata."""
    make_scans(model)
    _set_opset(model, form.opset)
    passes.CommonSubexpressionEliminationPass()(model)
    remove_unused(model)
    graph = model.graph
    _share_tied_weights(graph, stand_ins or StandIns([]))
    remove_unused(model)
    _name_weights(graph)
    _name_interface(graph, form, blocks)
    passes.ClearMetadataAndDocStringPass()(model)
    _forget_symbols(graph)
    # Rows of a static cache are padded on the right, so their last tokens are not at the same position.
    if "logits" in form.outputs and WRITE_INDICES not in form.inputs:
        add_num_logits_input(model)
    model.producer_name, model.producer_version = "nbl-export", __version__
    graph.name = "encoder" if form.name == ENCODER else "decoder"
    return model


def _set_opset(model: ir.Model, opset: int) -> None:
    # The exporter's opset 23 graph is also valid in opset 24; some symbolic operators exist only there.
    for node in model.graph:
        node.domain = "" if node.domain == SYMBOLIC_DOMAIN and node.op_type != EXPERTS else node.domain
        node.version = None
    model.opset_imports.pop(SYMBOLIC_DOMAIN, None)
    model.opset_imports[""] = opset
    # What reads an old opset reads no newer format of the file.
    oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(int(model.ir_version), oldest)


def _share_tied_weights(graph: ir.Graph, stand_ins: StandIns) -> None:
    """Store a tied embedding once: a head that was folded into a transposed copy reads a Transpose of it."""
    embeddings = [n.inputs[0] for n in graph if n.op_type == "Gather"]
    tables = [(value, table) for value in embeddings if (table := _constant(value)) is not None]
    for node in [n for n in graph if n.op_type == "MatMul"]:
        if (head := _constant(node.inputs[1])) is None:
            continue
        same = (v for v, t in tables if t.shape == head.T.shape and stand_ins.equal(t, head.T))
        if (embedding := next(same, None)) is not None:
            transpose = ir.node("Transpose", [embedding], {"perm": [1, 0]})
            node.prepend(transpose)
            node.replace_input_with(1, transpose.outputs[0])


def _constant(value: ir.Value | None) -> np.ndarray | None:  # type: ignore[type-arg]
    """The array of a constant matrix, or None for anything else."""
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value.const_value.numpy()


def _name_weights(graph: ir.Graph) -> None:
    """Rename folded constants such as val_17 after the module whose MatMul reads them."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        scopes = node.metadata_props.get(_SCOPES)
        if weight is not None and scopes and weight.is_initializer() and str(weight.name).startswith("val_"):
            scope = [s.strip(" '\"") for s in scopes.strip("[]").split(",")][-2:][0]
            name = f"{scope}.matmul_weight"
            if name not in graph.initializers:
                weight.name = name
    for value in list(graph.initializers.values()):
        if str(value.name).startswith("model."):
            value.name = str(value.name).removeprefix("model.")


def _forget_symbols(graph: ir.Graph) -> None:
    """Remove torch's symbols (s26) from the shapes of intermediate tensors; shape inference computes them again."""
    interface = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in interface and value.shape is not None:
                # An unnamed dimension is unknown, which is correct; an old name would be wrong.
                value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])


def _name_interface(graph: ir.Graph, form: Form, blocks: Sequence[BlockCache]) -> None:
    pasts, presents = list(form.inputs.items()), list(form.outputs.items())
    state = {0: BATCH}
    for layer, block in enumerate(blocks):
        for side in SIDES if block.kv else ():
            pasts.append((f"past_key_values.{layer}.{side}", form.past))
            presents.append((f"present.{layer}.{side}", form.present))
        for one in block.states:
            pasts.append((f"past.{layer}.{one.kind}", state))
            presents.append((f"present.{layer}.{one.kind}", state))
    if len(graph.inputs) != len(pasts) or len(graph.outputs) != len(presents):
        raise BuildError(
            f"The exported graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs for {len(blocks)} "
            "layers, so a cache entry was optimized away: choose another --exporter."
        )
    values = [*graph.inputs, *graph.outputs]
    for value, (name, dims) in zip(values, [*pasts, *presents], strict=True):
        value.name = name
        assert value.shape is not None
        # A dimension that is fixed, as the number of tokens of an image, has no name.
        value.shape = ir.Shape(
            [d if isinstance(d, int) else dims.get(i, d) for i, d in enumerate(value.shape)]
        )


# the last logits ----------------------------------------------------------------------------------


def add_num_logits_input(model: ir.Model) -> bool:
    """Add the optional input :data:`NUM_LOGITS_TO_KEEP` to the decoder graph; returns whether it has it now.

    The graph stays unchanged if the logits are not one product of states [batch, sequence, d] with a constant
    weight.
    """
    graph = model.graph
    if any(value.name == NUM_LOGITS_TO_KEEP for value in graph.inputs):
        return True
    chain, head = _head(model)
    states = head.inputs[0] if head is not None else None
    if head is None or states is None or chain[0].shape is None or len(chain[0].shape) != 3:
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
    for value in chain:
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


def _head(model: ir.Model) -> tuple[list[ir.Value], ir.Node | None]:
    """The logits and the elementwise chain before them, back to the output of the product that computes them."""
    chain: list[ir.Value] = []
    value = next((v for v in model.graph.outputs if v.name == "logits"), None)
    while value is not None:
        chain.append(value)
        node = value.producer()
        if node is None or node.op_type not in _ELEMENTWISE:
            return chain, node if node is not None and linear_op(node) is not None else None
        moving = [v for v in node.inputs if v is not None and not is_constant(v)]
        value = moving[0] if len(moving) == 1 else None
    return chain, None
