"""Check that the linear layers of a written graph compute what the plan says: W u + b, as their format stores W.

W is rounded to the format of the graph, which is known: the numbers that the plan's W becomes in it are computed here
once more. What the layer makes of PyTorch's u must be their product with u, to the error of computing it (of float32,
of half precision, of activations rounded to 8 bits), which is computed here too. So the rounding of W hides nothing:
W × 1.1 is 0.1 away in any format. What the layer makes of zeros must be b. An error is relative to the product alone,
or to b alone, so that a large b hides no wrong W, and a large product no wrong b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.batch import F32
from nbl_export.blocks import Block
from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.operators import linear_op
from nbl_export.graph.summary import ProvenTensors
from nbl_export.linearize.plan import LinearLayer, Plan, linear_name, linear_output_name
from nbl_export.rewrite.probe_runner import ProbeRunner, relative_error
from nbl_export.rewrite.prove import Proof, without_later
from nbl_export.rewrite.quantize import computed, stands_for

# The error of computing a right layer in float32, and how much more than its known error any layer's may be.
_FLOAT32 = 1e-3
_ROOM = 2.0


@dataclass(frozen=True)
class LinearPart:
    """The nodes of one linear layer of a graph, in order, and the activation that they read."""

    nodes: tuple[ir.Node, ...]
    reads: ir.Value
    output: ir.Value

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        """The initializers of its nodes."""
        inputs = (v for n in self.nodes for v in n.inputs if v is not None and v.is_initializer())
        return tuple(dict.fromkeys(inputs))

    @property
    def products(self) -> tuple[ir.Node, ...]:
        """Its products with a weight: one, or two of low rank."""
        return tuple(n for n in self.nodes if linear_op(n))

    @property
    def dtype(self) -> ir.DataType:
        """What it computes in: the dtype of its bias."""
        biases = (
            v for n in reversed(self.nodes) if n.op_type == "Add" for v in n.inputs if v in self.weights
        )
        return next((v.dtype for v in biases if v is not None and v.dtype), ir.DataType.FLOAT)


def linear_part(model: ir.Model, layer: Block) -> LinearPart | str:
    """The linear layer that replaced the attention of ``layer``, or what is wrong with it."""
    name, prefix = linear_output_name(layer), f"{linear_name(layer)}."
    output = next((v for node in model.graph for v in node.outputs if v.name == name), None)
    if output is None:
        return f"the graph has no tensor {name}"
    nodes: set[ir.Node] = set()
    reads: dict[ir.Value, None] = {}
    stack = [output]
    while stack:
        value = stack.pop()
        maker = value.producer()
        if maker is None or not str(value.name).startswith(prefix):
            reads[value] = None
        elif maker not in nodes:
            nodes.add(maker)
            stack += [v for v in maker.inputs if v is not None and not v.is_initializer()]
    if len(reads) != 1:
        return f"it reads {', '.join(str(v.name) for v in reads) or 'nothing'} instead of one tensor"
    return LinearPart(tuple(n for n in model.graph if n in nodes), next(iter(reads)), output)


@dataclass(frozen=True)
class LinearCheck:
    """What storing W costs a linear layer, ‖Ŵu - Wu‖ / ‖Wu‖ on the probe, and what is wrong with it, in words.

    ``ratios`` are its errors, of its product with u and of its bias, in units of what is allowed.
    """

    layer: Block
    stored: float = float("inf")
    failure: str = ""
    ratios: tuple[float, ...] = ()


def check_layers(path: Path, tensors: Mapping[Block, ProvenTensors], plan: Plan) -> list[LinearCheck]:
    """One check of each of the plan's linear layers in the graph at ``path``; ``tensors`` are the proven ones.

    Raises :class:`~nbl_export.errors.InputError` if onnxruntime does not run it.
    """
    model, runner = load_graph(path), ProbeRunner(path, plan)
    good: dict[Block, LinearPart] = {}
    checks: dict[Block, LinearCheck] = {}
    for layer in plan.linear:
        part, u = linear_part(model, layer), tensors[layer].input
        fault = part if isinstance(part, str) else ""
        if isinstance(part, LinearPart):
            products, wanted = len(part.products), 1 if plan.layers[layer].down is None else 2
            if part.reads.name != u:
                fault = f"it reads {part.reads.name} instead of {u}"
            elif products != wanted:
                fault = f"it has {products} products instead of {wanted}"
            if not fault:
                good[layer] = part
        checks[layer] = LinearCheck(layer, failure=f"the linear layer {layer} is wrong: {fault}")
    given = {layer: runner.split(plan.probe_u[layer], tensors[layer].shapes) for layer in good}
    found = _outputs(runner, good, given)
    zeros = _outputs(runner, good, {i: [np.zeros_like(a) for a in rows] for i, rows in given.items()})
    values: dict[str | None, ir.Value] = {v.name: v for node in model.graph for v in node.outputs if v.name}
    values |= {v.name: v for v in model.graph.initializers.values()}
    for layer, part in good.items():
        linear, u_rows = plan.layers[layer], [a.reshape(-1, a.shape[-1]) for a in given[layer]]
        b = without_later(values.get(tensors[layer].later), linear.b)
        checks[layer] = _check(layer, part, linear, b, u_rows, found[layer], zeros[layer])
    return [checks[layer] for layer in plan.linear]


def confirm(path: Path, proofs: Mapping[Block, Proof], plan: Plan) -> list[LinearCheck]:
    """The checks of the linear layers written to ``path``; :class:`BuildError` if one does not compute W u + b."""
    tensors = {layer: proofs[layer].tensors for layer in plan.linear}
    checks = check_layers(path, tensors, plan) if tensors else []
    for check in checks:
        if check.failure:
            raise BuildError(
                f"The written graph is discarded, because {check.failure}: this is a bug of nbl-export, report it."
            )
    return checks


def _outputs(
    runner: ProbeRunner, parts: Mapping[Block, LinearPart], given: Mapping[Block, Sequence[F32]]
) -> dict[Block, F32]:
    """What each layer writes, [tokens, d], if it is given these rows."""
    result: dict[Block, F32] = {}
    while waiting := {layer: part for layer, part in parts.items() if layer not in result}:
        # Two layers that read one tensor are run one after the other.
        feeds: dict[str, Block] = {}
        for layer, part in waiting.items():
            feeds.setdefault(str(part.reads.name), layer)
        names = {layer: str(parts[layer].output.name) for layer in feeds.values()}
        found = runner.run(list(names.values()), {u: given[layer] for u, layer in feeds.items()})
        result |= {layer: runner.joined([row[name] for row in found]) for layer, name in names.items()}
    return result


def _check(
    layer: Block,
    part: LinearPart,
    linear: LinearLayer,
    b: F32,
    rows: Sequence[F32],
    found: F32,
    zeros: F32,
) -> LinearCheck:
    factors = [linear.w] if linear.down is None or linear.up is None else [linear.down, linear.up]
    kept = [stands_for(w, node) for w, node in zip(factors, part.products, strict=True)]
    exact, stored = (np.concatenate([_through(u, of) for u in rows]) for of in (factors, kept))
    known = np.concatenate([computed(u, kept, part.products, b, part.dtype) for u in rows])
    bias = b.astype(part.dtype.numpy()).astype(np.float32)
    failure, ratios = "", []
    for what, of, right, by_format in (
        ("W u", found - zeros[:1], stored, known - bias),
        ("b", zeros[:1], b[None], bias[None]),
    ):
        error, allowed = relative_error(of, right), _FLOAT32 + _ROOM * relative_error(by_format, right)
        ratios.append(error / allowed)
        if not error <= allowed and not failure:
            failure = (
                f"the linear layer {layer} differs by {error:.1e} from the plan's {what} as this graph stores it, more "
                f"than {allowed:.1g} relative"
            )
    return LinearCheck(layer, relative_error(stored, exact), failure, tuple(ratios))


def _through(u: F32, factors: Sequence[F32]) -> F32:
    x = u.astype(np.float64)
    for w in factors:
        x = x @ w.T.astype(np.float64)
    return x.astype(np.float32)
