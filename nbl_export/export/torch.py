"""Export a decoder with ``torch.onnx.export(dynamo=True)``: one graph for prefill and decode; or an encoder.

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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch

from nbl_export.errors import BuildError, InputError, NblError, first_line, interrupt_behind
from nbl_export.export.forms import CONCAT, Form
from nbl_export.export.functions import experts_are_replaced, exportable
from nbl_export.export.fused import fuse_norms, group_queries
from nbl_export.export.tidy import StandIns, tidy
from nbl_export.graph.io import save_graph
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import layer_count, positions
from nbl_export.models.libraries import quiet, replaced
from nbl_export.models.walk import one_of_each_kind
from nbl_export.models.weights import resident, standing_in
from nbl_export.progress import Listener, Silent, Task

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
        if stand_ins.attach(graph.graph, used):
            return graph
    # Something was computed with a weight while it was traced.
    with listener.task("Exporting ONNX again", 3, "steps") as task, resident(model):
        return _traced(model, form, task, StandIns([]))[0]


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
        raise InputError(
            f"{type(model).__name__} {_why_not(error, model)}: this architecture is not supported yet."
        ) from error


def _why_not(error: Exception, model: torch.nn.Module) -> str:
    """What torch says of a model that it cannot trace, in our words where it is known."""
    first = first_line(error)
    if type(error).__name__.startswith("GuardOnDataDependent"):
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
