"""Export a decoder with ``torch.onnx.export(dynamo=True)``: one graph for prefill and decode; or an encoder.

It is written in a precision; for float16 the range of every tensor is measured on real text.

Inputs  input_ids, position_ids [batch, sequence], the inputs of the cache's form (:mod:`.forms`), and
        past_key_values.N.key/.value
Outputs logits [batch, sequence, vocab] float32, present.N.key/.value

The names are those of optimum and onnxruntime-genai. Three things differ from a plain export: the past length
comes from the mask (so it needs no layer's cache), grouped-query attention stays grouped instead of repeating
keys and values, and common subexpressions (cosines, sines, masks) are computed once.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export.batch import Inputs
from nbl_export.errors import BuildError, InputError, NblError, first_line, interrupt_behind
from nbl_export.export.experts import lower_experts
from nbl_export.export.forms import CONCAT, Form
from nbl_export.export.functions import experts_are_replaced, exportable
from nbl_export.export.fused import fuse_norms, group_queries
from nbl_export.export.tidy import StandIns, tidy
from nbl_export.files import TEMPORARY
from nbl_export.graph.integers import to_integers
from nbl_export.graph.io import save_graph
from nbl_export.graph.precision import Precision, to_precision
from nbl_export.graph.summary import Float32Node
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import NOT_YET, layer_count, positions
from nbl_export.models.running import quiet, replaced
from nbl_export.models.walk import one_of_each_kind
from nbl_export.models.weights import resident, standing_in
from nbl_export.progress import Listener, Silent, Task, bytes_task
from nbl_export.runtime.intermediates import batch_rows, compute_tensors

_SUFFIX = ".largest"
# The maximum number of tokens for a model whose configuration has no limit.
_LONGEST = 4096
# Seconds: ten times what a slow core takes to follow the code of a model without experts; of 128 experts, four times.
_BASE, _OF_BLOCK = 120.0, 60.0


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
    listener = listener or Silent()
    with listener.task("Exporting ONNX", 3, "steps") as task, standing_in(model) as found:
        stand_ins = StandIns(found)
        graph, used = _traced(model, form, task, stand_ins)
        attached = stand_ins.attach(graph.graph, used)
    if not attached:  # something was computed with a weight while it was traced
        with listener.task("Exporting ONNX again", 3, "steps") as task, resident(model):
            graph = _traced(model, form, task, StandIns([]))[0]
    lower_experts(graph, model, form.experts)
    return graph


def _traced(model: torch.nn.Module, form: Form, task: Task, stand_ins: StandIns) -> tuple[ir.Model, set[str]]:
    """The graph, and the names of the weights that the model uses."""
    try:
        program = _capture(model, form, layer_count(model))
        parameters = program.graph_signature.inputs_to_parameters
        read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
        used = {parameters[name].removeprefix("model.") for name in read & parameters.keys()}
        task.advance(1)
        # With opset 24 the exporter decomposes what it knows in 23.
        opset = min(form.opset, CONCAT.opset)
        with quiet(), torch.no_grad(), small_numbers_kept():
            exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except NblError:
        raise
    except Exception as error:
        if (interrupt := interrupt_behind(error)) is not None:
            raise interrupt from None
        raise BuildError(
            f"torch.onnx.export cannot export {type(model).__name__} ({first_line(error)[:300]}): choose another "
            "--exporter."
        ) from error
    assert exported is not None
    task.advance(1)
    graph = tidy(exported.model, form, dummy_run(model).cache if form.past else (), stand_ins)
    if form.fused:
        group_queries(graph, positions(model) or _LONGEST)
        fuse_norms(graph)
    task.advance(1)
    return graph, used


def _capture(model: torch.nn.Module, form: Form, blocks: int) -> torch.export.ExportedProgram:
    dummy_run(model)  # of the original model, before its functions are replaced
    decoder = form.module(model)
    limit = _time_limit(_BASE + _OF_BLOCK * blocks, type(model).__name__)
    with quiet(), exportable(model, decoder.mask), torch.no_grad(), limit:
        return form.capture(decoder)


@contextmanager
def _time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise :class:`InputError` when a module is called after ``seconds``: code with loops may take hours."""
    end = time.monotonic() + seconds

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise InputError(
                f"Tracing {name} takes longer than {seconds:,.0f} s, as it does for code that loops over tokens or "
                "experts: use another --kv-cache or --exporter, or a faster machine."
            )

    hook = torch.nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def small_numbers_kept() -> Iterator[None]:
    """Within the block, what torch.onnx simplifies keeps sums with numbers of 1e-8 and less.

    onnxscript takes them for zero and drops the sum. Such is the epsilon of the norms of Helium and Moshi, without
    which the norm of a token whose embedding is zero, as that of padding, is NaN.
    """
    matcher: Any = importlib.import_module("onnxscript.rewriter._matcher")
    close = SimpleNamespace(isclose=lambda a, b, rel_tol=1e-9, **_: math.isclose(a, b, rel_tol=rel_tol))
    with replaced(matcher, "math", close):
        yield


def check_traces(model: torch.nn.Module, form: Form) -> None:
    """Raise :class:`InputError` unless torch can trace ``model`` in ``form``, for texts of every length.

    One block of each kind is traced, without the numbers of its weights, so that this takes seconds for every model.
    """
    try:
        with standing_in(model), one_of_each_kind(model) as blocks:
            _capture(model, form, blocks)
    except NblError:
        raise
    except Exception as error:
        raise InputError(f"{type(model).__name__} {_why_not(error, model, form.remedy)}.") from error


def _why_not(error: Exception, model: torch.nn.Module, remedy: str) -> str:
    """What torch says of a model that it cannot trace, in our words where it is known, and the remedy."""
    first = first_line(error)
    if type(error).__name__.startswith("GuardOnDataDependent"):
        if not experts_are_replaced(model):
            return (
                "runs the experts that its tokens go to in a loop of its own, not by transformers' interface for "
                f"experts, and a graph has the same steps for all texts: {NOT_YET}"
            )
        return (
            "goes one of two ways by a number that it computes from a text, as the length of its longest row, and a "
            f"graph goes the same way for all texts: {remedy}"
        )
    if "Constraints violated" in first:
        return (
            f"takes a step for each token of a text, and a graph has the same steps for all texts: {remedy}"
        )
    return f"cannot be traced for texts of any length ({first[:200]}): {remedy}"


# in a precision ----------------------------------------------------------------------------------


def save_in_precision(
    graph: ir.Model,
    path: Path,
    precision: Precision,
    rows: Sequence[NDArray[Any] | Inputs] | Inputs,
    wide: Collection[str] = ("logits",),
    readers: Sequence[Path] = (),
    listener: Listener | None = None,
) -> tuple[list[Path], list[Float32Node]]:
    """Convert the float32 ``graph`` and write it to ``path``; returns the files and the nodes that stayed float32.

    ``rows`` are token ids of real text, or embeddings with positions, or an encoder's batch; a format with the range of
    float32 does not need them. ``wide`` names the inputs and outputs that stay float32. ``readers``: see
    :func:`save_graph`.
    """
    listener, ranges = listener or Silent(), {}
    weights = (value.const_value for value in graph.graph.initializers.values())
    size = sum(weight.nbytes for weight in weights if weight is not None)
    path.parent.mkdir(exist_ok=True)
    if precision.largest < float("inf"):
        scratch = tempfile.TemporaryDirectory(
            prefix=".fp32.", suffix=TEMPORARY, dir=path.parent, ignore_cleanup_errors=True
        )
        with bytes_task(listener, "Measuring ranges", size) as done, scratch as folder:
            copy = graph.clone()
            copy.meta.update(graph.meta)
            ranges = ranges_of(copy, rows, Path(folder), done)
    if precision.bits:
        to_integers(graph, precision.bits)
    float32 = to_precision(graph, precision, ranges, wide)
    with bytes_task(listener, "Writing the graph", size) as done:
        files = save_graph(graph, path, progress=done, readers=readers)
    return files, float32


def ranges_of(
    model: ir.Model,
    rows: Sequence[NDArray[Any] | Inputs] | Inputs,
    scratch: Path | None = None,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> dict[str, float]:
    """The largest magnitude of every float32 tensor of ``model``, which is changed, over a prefill of ``rows``.

    For an encoder ``rows`` is a batch by input name. Each tensor is reduced inside the graph, and the graph is run in
    parts, row by row, so memory is that of one part and what it computes of a row; ``scratch`` is a folder for the
    weights of a part that are in no file. Padding is included because it is computed too; a tensor with NaN counts as
    infinite. ``progress`` receives the bytes of the weights of each part that has run.
    """
    passes.ShapeInferencePass()(model)
    names = _reduce_all(model.graph)
    found = compute_tensors(model, names, batch_rows(model, rows), progress=progress, scratch=scratch)
    return {name.removesuffix(_SUFFIX): float(max(row[name] for row in found)) for name in names}


def _reduce_all(graph: ir.Graph) -> list[str]:
    """Add the largest magnitude of each tensor, computed where the tensor is; returns their names.

    Only reductions, which make no second tensor of that size: of the transposed head of a large model, the third
    would be gigabytes.
    """
    infinity = ir.Value(name="infinity", const_value=ir.tensor(np.float32(np.inf)))
    graph.register_initializer(infinity)
    names = []
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT or not value.name:
                continue
            high, low, squares = (
                ir.node(f"Reduce{kind}", [value], {"keepdims": 0}) for kind in ("Max", "Min", "SumSquare")
            )
            minus = ir.node("Neg", [low.outputs[0]])
            size = ir.node("Max", [high.outputs[0], minus.outputs[0]])
            # onnxruntime's ReduceMax and ReduceMin ignore NaN; a sum does not, and squares do not cancel.
            bad = ir.node("IsNaN", [squares.outputs[0]])
            largest = ir.node("Where", [bad.outputs[0], infinity, size.outputs[0]])
            names.append(f"{value.name}{_SUFFIX}")
            largest.outputs[0].name = names[-1]
            largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            graph.insert_after(node, [high, low, squares, minus, size, bad, largest])
    return names
