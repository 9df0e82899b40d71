"""Export a decoder with ``torch.onnx.export(dynamo=True)``: one graph for prefill and decode; or an encoder.

Inputs  input_ids, position_ids [batch, sequence], the inputs of the cache's form (:mod:`.forms`), and
        past_key_values.N.key/.value
Outputs logits [batch, sequence, vocab] float32, present.N.key/.value

The names are those of optimum and onnxruntime-genai. Three things differ from a plain export: the past length
comes from the mask (so it needs no layer's cache), grouped-query attention stays grouped instead of repeating
keys and values, and common subexpressions (cosines, sines, masks) are computed once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from nbl_export import __version__
from nbl_export.batch.names import (
    BATCH,
    SIDES,
    WRITE_INDICES,
    past_name,
    past_state_name,
    present_name,
    present_state_name,
)
from nbl_export.errors import BuildError, InputError, NblError, first_line, interrupt_behind
from nbl_export.export.forms import CONCAT, ENCODER, Form
from nbl_export.export.functions import experts_are_replaced, exportable
from nbl_export.export.grouped import group_queries
from nbl_export.export.lm_head import add_num_logits_input
from nbl_export.export.scans import make_scans
from nbl_export.export.skip_norms import fuse_norms
from nbl_export.export.stand_ins import StandIns
from nbl_export.export.symbols import SYMBOLIC_DOMAIN, small_numbers_kept
from nbl_export.export.time_limit import seconds_for, seconds_to_write, time_limit
from nbl_export.graph.io import save_graph
from nbl_export.graph.operators import int_attribute
from nbl_export.models.caches import BlockCache
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import layer_count, positions
from nbl_export.models.load import quiet
from nbl_export.models.partial_forward import one_of_each_kind
from nbl_export.models.stand_ins import standing_in
from nbl_export.models.weights import resident
from nbl_export.progress import Listener, Silent, Task

# The maximum number of tokens for a model whose configuration has no limit.
_LONGEST = 4096
_SCOPES = "pkg.torch.onnx.name_scopes"


def export_torch(
    model: torch.nn.Module, path: Path, listener: Listener | None = None, form: Form = CONCAT
) -> list[Path]:
    """Export ``model`` (float32, CPU) to ``path`` with external data; returns the files.

    Raises the errors of :func:`trace`, and :class:`BuildError` if the ONNX checker refuses the result.
    """
    return save_graph(trace(model, form, listener), path)


def trace(model: torch.nn.Module, form: Form = CONCAT, listener: Listener | None = None) -> ir.Model:
    """The graph of ``model`` (float32, CPU) with a KV cache of this ``form``.

    Raises :class:`BuildError` if torch cannot export it, :class:`InputError` if it cannot have that form.
    """
    with (listener or Silent()).task("Exporting ONNX", 3, "steps") as task, standing_in(model) as found:
        stand_ins = StandIns(found)
        graph, used = _traced(model, form, task, stand_ins)
        if stand_ins.attach(graph.graph, used):
            return graph
    # Something was computed with a weight while it was traced.
    with (listener or Silent()).task("Exporting ONNX again", 3, "steps") as task, resident(model):
        return _traced(model, form, task, StandIns([]))[0]


def _traced(model: torch.nn.Module, form: Form, task: Task, stand_ins: StandIns) -> tuple[ir.Model, set[str]]:
    """The graph, and the names of the weights that the model uses."""
    try:
        dummy_run(model)  # of the original model, before its functions are replaced
        decoder = form.module(model)
        name, begun = type(model).__name__, time.monotonic()
        # With opset 24 the exporter decomposes what it knows in 23.
        opset = min(form.opset, CONCAT.opset)
        with quiet(), exportable(model, decoder.mask), torch.no_grad():
            with time_limit(seconds_for(layer_count(model)), name):
                program = form.capture(decoder)
            used = _used_weights(program)
            task.advance(1)
            with time_limit(seconds_to_write(time.monotonic() - begun), name), small_numbers_kept():
                exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except NblError:
        raise
    except Exception as error:
        if (interrupt := interrupt_behind(error)) is not None:
            raise interrupt from None
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise BuildError(
            f"torch.onnx.export cannot export {type(model).__name__} ({first[0][:300]}): choose another --exporter."
        ) from error
    assert exported is not None
    task.advance(1)
    graph = tidy(exported.model, form, dummy_run(model).cache if form.past else (), stand_ins)
    if form.fused:
        group_queries(graph, positions(model) or _LONGEST)
        fuse_norms(graph)
    task.advance(1)
    return graph, used


def _used_weights(program: torch.export.ExportedProgram) -> set[str]:
    named = program.graph_signature.inputs_to_parameters
    read = (node for node in program.graph.nodes if node.op == "placeholder" and node.users)
    return {named[node.name].removeprefix("model.") for node in read if node.name in named}


def check_traces(model: torch.nn.Module, form: Form) -> None:
    """Raise :class:`InputError` unless torch can trace ``model`` in ``form``, for texts of every length.

    One block of each kind is traced, without the numbers of its weights, so that this takes seconds for every model.
    """
    name = type(model).__name__
    try:
        dummy_run(model)
        decoder = form.module(model)
        with (
            quiet(),
            standing_in(model),
            one_of_each_kind(model) as blocks,
            time_limit(seconds_for(blocks), name),
            exportable(model, decoder.mask),
            torch.no_grad(),
        ):
            form.capture(decoder)
    except NblError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} {_why_not(error, model)}: this architecture is not supported yet."
        ) from error


def _why_not(error: Exception, model: torch.nn.Module) -> str:
    """What torch says of a model that it cannot trace, in our words where it is known."""
    first = first_line(error)
    kind = type(error).__name__
    if kind.startswith("GuardOnDataDependent"):
        if not experts_are_replaced(model):
            return (
                "runs the experts that its tokens go to in a loop of its own, not by transformers' interface for "
                "experts, and a graph has the same steps for all texts"
            )
        return (
            "goes one of two ways by a number that it computes from a text, as the length of its longest row, and a "
            "graph goes the same way for all texts"
        )
    if "Constraints violated" in first:
        return "takes a step for each token of a text, and a graph has the same steps for all texts"
    return f"cannot be traced for texts of any length ({first[:200]})"


def tidy(
    model: ir.Model, form: Form, blocks: Sequence[BlockCache], stand_ins: StandIns | None = None
) -> ir.Model:
    """Set public names and dimensions, share common subexpressions, and remove torch's own metadata."""
    make_scans(model)
    _set_opset(model, form.opset)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    _share_tied_weights(graph, stand_ins or StandIns([]))
    _unstack_weights(graph)
    passes.RemoveUnusedNodesPass()(model)
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
        node.domain = "" if node.domain == SYMBOLIC_DOMAIN else node.domain
        node.version = None
    model.opset_imports.pop(SYMBOLIC_DOMAIN, None)
    model.opset_imports[""] = opset
    # What reads an old opset reads no newer format of the file.
    oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(int(model.ir_version), oldest)


def _share_tied_weights(graph: ir.Graph, stand_ins: StandIns) -> None:
    """Store a tied embedding once: a head that was folded into a transposed copy reads a Transpose of it."""
    embeddings = [n.inputs[0] for n in graph if n.op_type == "Gather"]
    for node in [n for n in graph if n.op_type == "MatMul"]:
        head = _constant(node.inputs[1])
        if head is None:
            continue
        for embedding in embeddings:
            table = _constant(embedding)
            if table is not None and table.shape == head.T.shape and stand_ins.equal(table, head.T):
                transpose = ir.node("Transpose", [embedding], {"perm": [1, 0]})
                node.prepend(transpose)
                node.replace_input_with(1, transpose.outputs[0])
                break


def _unstack_weights(graph: ir.Graph) -> None:
    """Store each expert's matrix, transposed if needed, instead of slicing it from a stack at run time."""
    for stack in [v for v in graph.initializers.values() if v.shape is not None and len(v.shape) > 1]:
        taken = [_stack_index(usage.node, usage.idx) for usage in stack.uses()]
        if stack.const_value is None or not taken or None in taken:
            continue
        weights = stack.const_value.numpy()
        for usage, index in zip(list(stack.uses()), taken, strict=True):
            assert index is not None
            _store(graph, usage.node.outputs[0], weights[index], f"{stack.name}.{index}")


def _stack_index(node: ir.Node, argument: int) -> int | None:
    """The constant index with which ``node`` slices the stack, its input ``argument``; None for any other node."""
    index = node.inputs[1].const_value if node.op_type == "Gather" and node.inputs[1] is not None else None
    if argument != 0 or int_attribute(node, "axis") != 0 or index is None or len(index.shape):
        return None
    return int(index.numpy())


def _store(graph: ir.Graph, value: ir.Value, array: np.ndarray, name: str) -> None:  # type: ignore[type-arg]
    transposes = [usage.node for usage in value.uses() if usage.node.op_type == "Transpose"]
    if transposes and len(transposes) == len(value.uses()) and array.ndim == 2:
        array, values = array.T, [node.outputs[0] for node in transposes]
    else:
        values = [value]
    tensor = ir.tensor(array, name=name)
    weight = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(weight)
    for replaced in values:
        ir.convenience.replace_all_uses_with(replaced, weight)


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
    named, given, kept = list(form.inputs.items()), list(form.outputs.items()), list(_kept(form, blocks))
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    if len(inputs) != len(named) + len(kept) or len(outputs) != len(given) + len(kept):
        raise BuildError(
            f"The exported graph has {len(inputs)} inputs and {len(outputs)} outputs for {len(blocks)} layers, "
            "so a cache entry was optimized away: choose another --exporter."
        )
    for value, (name, dims) in zip(inputs, [*named, *(past for past, _ in kept)], strict=True):
        _rename(value, name, dims)
    for value, (name, dims) in zip(outputs, [*given, *(present for _, present in kept)], strict=True):
        _rename(value, name, dims)


def _rename(value: ir.Value, name: str, dims: Mapping[int, str]) -> None:
    value.name = name
    assert value.shape is not None
    # A dimension that is fixed, as the number of tokens of an image, has no name.
    value.shape = ir.Shape([d if isinstance(d, int) else dims.get(i, d) for i, d in enumerate(value.shape)])


Named = tuple[str, Mapping[int, str]]


def _kept(form: Form, blocks: Sequence[BlockCache]) -> Iterator[tuple[Named, Named]]:
    """Input and output of everything that the ``blocks`` keep, in order, with their dimensions."""
    for layer, block in enumerate(blocks):
        for side in SIDES if block.kv else ():
            yield (past_name(layer, side), form.past), (present_name(layer, side), form.present)
        for state in block.states:
            yield (
                (past_state_name(layer, state.kind), {0: BATCH}),
                (present_state_name(layer, state.kind), {0: BATCH}),
            )
