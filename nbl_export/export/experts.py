"""Write the experts of a mixture in the form that suits where the graph will run; traced, they are one operator.

    x [tokens, d], places and weights [tokens, k] of the experts of each token ─► Experts ─► y [tokens, d]

The size of a graph does not grow with the number of experts: their weights stay stacked, [experts, …].

moe     ``com.microsoft.MoE``, which onnxruntime has; for SwiGLU, clamped or not.
loop    A Scan over the experts, each of which computes the tokens that were sent to it. Standard operators. Few experts
        are a product each instead, which onnxruntime computes faster.
dense   For TensorRT, whose loops have no sizes that follow from the numbers. As many experts as there are places, one
        token each; or where that would be more than all, all experts with all tokens.

What one expert computes is traced by itself, with its weights as inputs, and is put into a form as often as it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nbl_export.errors import InputError
from nbl_export.export.traced_experts import EXPERTS, body_of, turned
from nbl_export.graph.integers import BLOCK
from nbl_export.graph.nodes import Nodes, late_initializer, put_in_place
from nbl_export.graph.operators import MICROSOFT, remove_unused
from nbl_export.graph.precision import PRECISIONS
from nbl_export.models.dummy_run import dummy_run

MOE, LOOP, DENSE = "moe", "loop", "dense"
# As many are a product each, which scripts/bench_experts.py times beside the Scan.
_FEW = 16
# What a router's softmax makes nothing of, in every precision.
_NEVER = -1e4
_INT: Any = {"dtype": ir.DataType.INT64}


def lower_experts(model: ir.Model, of: torch.nn.Module, form: str) -> None:
    """Replace every :data:`EXPERTS` in ``model``, the graph of the module ``of``, by nodes of the ``form``."""
    modules, bodies, graph = list(of.modules()), dict[str, ir.Graph](), model.graph
    found = [n for n in graph if n.op_type == EXPERTS]
    for node in found:
        module: Any = modules[node.attributes["module"].as_int()]
        make = Nodes(str(node.name))
        x, places, weights, *stacks = (value for value in node.inputs if value is not None)
        sent = _Sent(make, x, places, weights, module.num_experts)
        if form == MOE and (swiglu := _swiglu(module)) is not None:
            _moe(sent, [_for_moe(graph, stack, module) for stack in stacks], swiglu)
            model.opset_imports[MICROSOFT] = 1
        else:
            key = repr((module, [v for v in vars(module).values() if isinstance(v, (int, float))]))
            if key not in bodies:
                bodies[key] = body_of(module, int(model.opset_imports[""]))
            lowered = _dense if form == DENSE else _each if module.num_experts <= _FEW else _loop
            lowered(sent, [_for_product(graph, stack, module) for stack in stacks], bodies[key])
        put_in_place(node, make.made)
    if found:
        remove_unused(model)


def check_precision(of: torch.nn.Module, precision: str) -> None:
    """Raise :class:`InputError` if the experts of ``of`` cannot be had in this ``precision``.

    Integers of many experts are for onnxruntime's operator alone, which has SwiGLU and whole blocks. In half precision
    rounding sends tokens to other experts: it is known of a top-k which ones, and how near the scores were.
    """
    half = precision in PRECISIONS
    module: Any
    for module in (one for one in of.modules() if hasattr(one, "has_post_expert_norm")):
        if half:
            able, other = dummy_run(of).top_k, "fp32"
            why = "is sent its tokens by no top-k, so that what rounding sends elsewhere looks like a wrong graph in"
        elif _swiglu(module) is not None:
            able, other = not any(size % BLOCK for size in module.down_proj.shape[1:]), "fp16 or bf16"
            why = f"multiplies by matrices that have no whole blocks of {BLOCK} numbers, as those have of"
        else:
            able, other = module.num_experts <= _FEW, "fp16 or bf16"
            why = "is not gated as SwiGLU, and onnxruntime computes no other experts of"
        if not able:
            raise InputError(f"{type(module).__name__} {why} --precision {precision}: use {other}.")


@dataclass(frozen=True)
class _Sent:
    """Tokens ``x`` [tokens, d] and the ``places`` and ``weights`` [tokens, k] of the ``experts`` each is sent to."""

    make: Nodes
    x: ir.Value
    places: ir.Value
    weights: ir.Value
    experts: int

    @property
    def k(self) -> int:
        assert self.places.shape is not None and isinstance(self.places.shape[-1], int)
        return self.places.shape[-1]

    def spread(self, value: ir.Value, elsewhere: float) -> ir.Value:
        """``value`` [tokens, k] at the places of [tokens, experts], and ``elsewhere`` there."""
        make = self.make
        shape = make(
            "Concat", make("Shape", self.places, end=1, **_INT), make.number([self.experts]), axis=0, **_INT
        )
        base = make("Expand", make.number(elsewhere, np.float32), shape)
        return make("ScatterElements", base, self.places, value, axis=1)


def _changed(
    graph: ir.Graph, stack: ir.Value, suffix: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> ir.Value:
    """A weight with the numbers of ``stack``, in another order; made when it is read."""
    tensor = stack.const_value
    assert tensor is not None
    shape = change(np.broadcast_to(np.False_, tensor.shape.numpy())).shape
    return late_initializer(
        graph, f"{stack.name}.{suffix}", shape, tensor.dtype, lambda: change(tensor.numpy())
    )


def _apart(graph: ir.Graph, stack: ir.Value, experts: int) -> list[ir.Value]:
    """The weight of each of the ``experts`` in ``stack``, which is read once for all if they are read in turn."""
    tensor, held = stack.const_value, list[NDArray[Any]]()
    assert tensor is not None
    _, *shape = tensor.shape.numpy()
    if not shape:  # the same for all
        return [stack] * experts

    def one(number: int) -> NDArray[Any]:
        if not held:
            held.append(tensor.numpy())
        found = np.ascontiguousarray(held[0][number])
        if number == experts - 1:
            held.clear()
        return found

    return [
        late_initializer(graph, f"{stack.name}.{n}", shape, tensor.dtype, partial(one, n))
        for n in range(experts)
    ]


def _for_product(graph: ir.Graph, stack: ir.Value, module: Any) -> ir.Value:
    """``stack`` as :func:`~.traced_experts.turned` has it."""
    rank = len(stack.shape or ())
    as_it_is = rank == 1 or (rank == 3 and module.is_transposed)
    return stack if as_it_is else _changed(graph, stack, "turned", lambda array: turned(array, module))


# moe ----------------------------------------------------------------------------------------------


def _swiglu(module: Any) -> dict[str, Any] | None:
    """The attributes of onnxruntime's SwiGLU that computes what ``module`` does between its products, or None."""
    if not module.has_gate or module.has_post_expert_norm:
        return None
    gate, up = (
        torch.linspace(-20, 20, 401)[torch.randperm(401, generator=torch.Generator().manual_seed(n))]
        for n in (0, 1)
    )
    large = torch.full((1,), 1e4)

    def gated(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        both = torch.cat([g, u]) if module.is_concatenated else torch.stack([g, u], -1).reshape(-1)
        return module._apply_gate(both[None])[0]  # type: ignore[no-any-return]

    with torch.inference_mode():
        found, most = gated(gate, up), float(gated(large, large))
        for alpha, beta in ((1.0, 0.0), (1.702, 1.0)):
            limit = (math.sqrt(beta * beta + 4 * most) - beta) / 2  # most = limit (limit + beta)
            g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
            if torch.allclose(found, g * torch.sigmoid(alpha * g) * (u + beta), rtol=1e-5, atol=1e-6):
                known = {"activation_alpha": alpha, "activation_beta": beta}
                return known if limit > 5e3 else {**known, "swiglu_limit": limit}
    return None


def _for_moe(graph: ir.Graph, stack: ir.Value, module: Any) -> ir.Value:
    """``stack`` [experts, outputs, inputs] or [experts, outputs], gate and up interleaved."""
    assert stack.shape is not None
    first = "gate_up" in str(stack.name) and module.is_concatenated

    def change(array: NDArray[Any]) -> NDArray[Any]:
        if array.ndim == 3 and module.is_transposed:
            array = array.swapaxes(1, 2)
        if not first:
            return array
        count, rows, *others = array.shape
        return array.reshape(count, 2, rows // 2, *others).swapaxes(1, 2).reshape(array.shape)

    return (
        _changed(graph, stack, "moe", change)
        if first or (module.is_transposed and len(stack.shape) == 3)
        else stack
    )


def _moe(sent: _Sent, stacks: Sequence[ir.Value], swiglu: Mapping[str, Any]) -> ir.Value:
    """The operator takes a softmax of scores, the k largest of it, and weights that sum to 1.

    So the scores are the logarithms of the weights, and what it gives is multiplied by their sum.
    """
    make, axis = sent.make, sent.make.number([1])
    positive = make("Max", sent.weights, make.number(1e-30, np.float32))
    shares = make("Div", positive, make("ReduceMax", positive, axis))
    scores = sent.spread(make("Log", shares), _NEVER)
    up, down, *biases = [*stacks, None, None][:4]
    told = {
        "k": sent.k,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        **swiglu,
    }
    y = make("MoE", sent.x, scores, up, biases[0], down, biases[1], domain=MICROSOFT, **told)
    return make("Mul", y, make("ReduceSum", sent.weights, axis))


# loop, and each -----------------------------------------------------------------------------------


def _sorted(sent: _Sent) -> tuple[ir.Value, ...]:
    """What is sent, n in all, sorted by expert: tokens [n], places [n, 2], and [experts] how many; x and weights."""
    make, zero, one = sent.make, sent.make.number([0]), sent.make.number([1])
    numbers = make.number(np.arange(sent.experts)[:, None, None])
    same = make("Equal", make("Unsqueeze", sent.places, zero, **_INT), numbers, dtype=ir.DataType.BOOL)
    found = make("NonZero", same, **_INT)
    counts = make("ReduceSum", make("Cast", same, to=7, **_INT), make.number([1, 2]), keepdims=0, **_INT)
    token = make("Gather", found, make.number(1), axis=0, **_INT)
    where = make("Transpose", make("Slice", found, one, make.number([3]), zero, **_INT), perm=[1, 0], **_INT)
    rows = make("Gather", sent.x, token, axis=0)
    weights = make("Unsqueeze", make("GatherND", sent.weights, where), one)
    return token, where, counts, rows, weights


def _each(sent: _Sent, stacks: Sequence[ir.Value], body: ir.Graph) -> ir.Value:
    """A product for each expert, whose weights onnxruntime can prepare."""
    make, zero, one = sent.make, sent.make.number([0]), sent.make.number([1])
    _, where, counts, rows, weights = _sorted(sent)
    graph = stacks[0].graph
    assert graph is not None
    make("Split", make("Unsqueeze", rows, zero), counts, axis=1, outputs=sent.experts)
    weights_of = [_apart(graph, stack, sent.experts) for stack in stacks]
    parts = [
        _inline(body, part_and_own, make)
        for part_and_own in zip(make.made[-1].outputs, *weights_of, strict=True)
    ]
    y = make("Mul", make("Squeeze", make("Concat", *parts, axis=1), zero), weights)
    shape = make(
        "Concat", make("Shape", sent.places, **_INT), make("Shape", sent.x, start=1, **_INT), axis=0, **_INT
    )
    nothing = make("Expand", make.number(0.0, np.float32), shape)
    return make("ReduceSum", make("ScatterND", nothing, where, y), one, keepdims=0)


def _loop(sent: _Sent, stacks: Sequence[ir.Value], body: ir.Graph) -> ir.Value:
    make = sent.make
    token, _, counts, rows, weights = _sorted(sent)
    ends = make("CumSum", counts, make.number(0), **_INT)
    starts = make("Sub", ends, counts, **_INT)
    nothing = make("Expand", make.number(0.0, np.float32), make("Shape", sent.x, **_INT))
    within = Nodes(f"{make.prefix}/expert")

    def given(name: str, like: ir.Value) -> ir.Value:
        return ir.Value(name=f"{within.prefix}/{name}", type=ir.TensorType(like.dtype or ir.DataType.FLOAT))

    before, start, end = given("sum", nothing), given("start", starts), given("end", ends)
    scanned = [stack for stack in stacks if len(stack.shape or ()) > 1]
    own = {stack: given(f"weight.{n}", stack) for n, stack in enumerate(scanned)}
    zero, flat = within.number([0]), within.number([-1])
    limits = [within("Reshape", value, flat, **_INT) for value in (start, end)]
    cut = [within("Slice", v, *limits, zero, dtype=v.dtype) for v in (rows, weights, token)]
    y = _inline(
        body, [within("Unsqueeze", cut[0], zero), *(own.get(stack, stack) for stack in stacks)], within
    )
    y = within("Mul", within("Squeeze", y, zero), cut[1])
    y = within("Add", within("Gather", before, cut[2], axis=0), y)
    after = within("ScatterND", before, within("Unsqueeze", cut[2], within.number([1]), **_INT), y)
    inner = ir.Graph([before, start, end, *own.values()], [after], nodes=within.made, name="expert")
    return make("Scan", nothing, starts, ends, *scanned, body=inner, num_scan_inputs=2 + len(scanned))


# dense --------------------------------------------------------------------------------------------


def _dense(sent: _Sent, stacks: Sequence[ir.Value], body: ir.Graph) -> ir.Value:
    """All in sizes that follow from the number of tokens t alone, n = t k being fewer than all E experts or not:

    few   n experts with one token each      weights [n, 1, 1]     y [1, t, k, d] summed over k
    many  E experts with all t tokens        weights [E, t, 1]     y [E, t, 1, d] summed over experts
    """
    make, zero, one = sent.make, sent.make.number([0]), sent.make.number([1])
    flat, every, k = make.number([-1]), make.number([sent.experts]), make.number([sent.k])
    t = make("Shape", sent.places, end=1, **_INT)
    n = make("Mul", t, k, **_INT)
    few = make("Less", n, every, dtype=ir.DataType.BOOL)

    def either(a: ir.Value, b: ir.Value) -> ir.Value:
        return make("Where", few, a, b, **_INT)

    def pick(a: ir.Value, b: ir.Value, count: ir.Value) -> ir.Value:
        """The ``count`` first of what has n numbers, or of what follows it."""
        both, begin = make("Concat", a, b, axis=0, dtype=a.dtype), either(zero, n)
        return make("Slice", both, begin, make("Add", begin, count, **_INT), zero, dtype=a.dtype)

    def to(limit: ir.Value) -> ir.Value:
        return make("Range", make.number(0), make("Squeeze", limit, zero, **_INT), make.number(1), **_INT)

    chosen, tokens = either(n, every), either(one, t)
    experts = pick(make("Reshape", sent.places, flat, **_INT), make.number(np.arange(sent.experts)), chosen)
    rows = make("Gather", sent.x, pick(make("Div", to(n), k, **_INT), to(t), either(n, t)), axis=0)
    shape = make("Concat", either(n, one), tokens, make("Shape", sent.x, start=1, **_INT), axis=0, **_INT)
    own = [make("Gather", s, experts, axis=0) if len(s.shape or ()) > 1 else s for s in stacks]
    y = _inline(body, [make("Reshape", rows, shape), *own], make)
    spread = make("Transpose", sent.spread(sent.weights, 0.0), perm=[1, 0])
    weights = pick(
        make("Reshape", sent.weights, flat),
        make("Reshape", spread, flat),
        make("Mul", chosen, tokens, **_INT),
    )
    weights = make("Reshape", weights, make("Concat", chosen, tokens, one, axis=0, **_INT))
    nothing = make.number(0.0, np.float32)
    # What an expert makes of a token that was not sent to it may be infinite, and is not used.
    used = make(
        "Where", make("Equal", weights, nothing, dtype=ir.DataType.BOOL), nothing, make("Mul", y, weights)
    )
    shape = make(
        "Concat",
        either(one, every),
        t,
        either(k, one),
        make("Shape", sent.x, start=1, **_INT),
        axis=0,
        **_INT,
    )
    return make("ReduceSum", make("Reshape", used, shape), make.number([0, 2]), keepdims=0)


def _inline(body: ir.Graph, inputs: Sequence[ir.Value], make: Nodes) -> ir.Value:
    """The output of ``body`` with these ``inputs``; its nodes are made anew."""
    values = dict(zip(body.inputs, inputs, strict=True))
    for value in body.initializers.values():
        values[value] = make("Constant", value=value.const_value, dtype=value.dtype)
    for node in body:
        given = [None if value is None else values[value] for value in node.inputs]
        told: dict[str, Any] = dict(node.attributes)
        make(node.op_type, *given, outputs=len(node.outputs), dtype=node.outputs[0].dtype, **told)
        values |= dict(zip(node.outputs, make.made[-1].outputs, strict=True))
    return values[body.outputs[0]]
