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
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block
from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.operators import linear_op
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
        return tuple(
            dict.fromkeys(v for n in self.nodes for v in n.inputs if v is not None and v.is_initializer())
        )

    @property
    def products(self) -> tuple[ir.Node, ...]:
        """Its products with a weight: one, or two of low rank."""
        return tuple(n for n in self.nodes if linear_op(n))

    @property
    def dtype(self) -> ir.DataType:
        """What it computes in: the dtype of its bias."""
        add = next(n for n in reversed(self.nodes) if n.op_type == "Add")
        return next(
            (v.dtype for v in add.inputs if v is not None and v.is_initializer() and v.dtype),
            ir.DataType.FLOAT,
        )


def linear_part(model: ir.Model, layer: Block) -> LinearPart | str:
    """The linear layer that replaced the attention of ``layer``, or what is wrong with it."""
    name = linear_output_name(layer)
    prefix = f"{linear_name(layer)}."
    output = next((v for node in model.graph for v in node.outputs if v.name == name), None)
    if output is None:
        return f"the graph has no tensor {name}"
    nodes: dict[ir.Node, None] = {}
    reads: dict[ir.Value, None] = {}
    stack = [output]
    while stack:
        value = stack.pop()
        maker = value.producer()
        if maker is None or not str(value.name).startswith(prefix):
            reads[value] = None
        elif maker not in nodes:
            nodes[maker] = None
            stack += [v for v in maker.inputs if v is not None and not v.is_initializer()]
    if len(reads) != 1:
        return f"it reads {', '.join(str(v.name) for v in reads) or 'nothing'} instead of one tensor"
    ordered = tuple(n for n in model.graph if n in nodes)
    if not any(n.op_type == "Add" for n in ordered) or not any(linear_op(n) for n in ordered):
        return "it is no product and sum"
    if not output.uses() and not output.is_graph_output():
        return "nothing reads its output"
    return LinearPart(ordered, next(iter(reads)), output)


@dataclass(frozen=True)
class LinearCheck:
    """How far one linear layer is from W u + b, and what is allowed.

    ``stored`` is what storing W costs, ‖Ŵu - Wu‖ / ‖Wu‖ on the probe. ``product`` is the relative error of the layer's
    product with u against that of the numbers that W is stored as, ``bias`` that of what it makes of zeros against b;
    ``product_allowed`` and ``bias_allowed`` are their limits. ``fault`` is what is wrong with it, in words.
    """

    layer: Block
    stored: float = float("inf")
    product: float = float("inf")
    product_allowed: float = 0.0
    bias: float = float("inf")
    bias_allowed: float = 0.0
    fault: str = ""

    @property
    def failure(self) -> str:
        """What is wrong, empty if nothing is."""
        if self.fault:
            return f"the linear layer {self.layer} is wrong: {self.fault}"
        for what, error, allowed in (
            ("W u", self.product, self.product_allowed),
            ("b", self.bias, self.bias_allowed),
        ):
            if not error <= allowed:
                return (
                    f"the linear layer {self.layer} differs by {error:.1e} from the plan's {what} as this graph stores "
                    f"it, more than {allowed:.1g} relative"
                )
        return ""


def check_layers(path: Path, proofs: Mapping[Block, Proof], plan: Plan) -> list[LinearCheck]:
    """One check of each of the plan's linear layers in the graph at ``path``.

    Raises :class:`~nbl_export.errors.InputError` if onnxruntime does not run it.
    """
    model = load_graph(path)
    parts = {layer: linear_part(model, layer) for layer in plan.linear}
    good: dict[Block, LinearPart] = {}
    checks: dict[Block, LinearCheck] = {}
    for layer, part in parts.items():
        u = proofs[layer].u
        assert u is not None  # proven layers have one
        if isinstance(part, str):
            checks[layer] = LinearCheck(layer, fault=part)
        elif part.reads.name != u.name:
            checks[layer] = LinearCheck(layer, fault=f"it reads {part.reads.name} instead of {u.name}")
        elif bad := _not_finite(part):
            checks[layer] = LinearCheck(layer, fault=f"{bad} is NaN or infinite")
        else:
            good[layer] = part
    runner = ProbeRunner(path, plan)
    given = {layer: runner.split(plan.probe_u[layer], proofs[layer].shapes) for layer in good}
    found = _outputs(runner, good, given)
    zeros = _outputs(runner, good, {i: [np.zeros_like(a) for a in rows] for i, rows in given.items()})
    for layer, part in good.items():
        u_rows = [a.reshape(-1, a.shape[-1]) for a in given[layer]]
        y = proofs[layer].y
        assert y is not None  # proven layers have one
        b = without_later(y, plan.layers[layer].b)
        checks[layer] = _check(layer, part, plan.layers[layer], b, u_rows, found[layer], zeros[layer])
    return [checks[layer] for layer in plan.linear]


def confirm(path: Path, proofs: Mapping[Block, Proof], plan: Plan) -> list[LinearCheck]:
    """The checks of the linear layers written to ``path``; :class:`BuildError` if one does not compute W u + b."""
    checks = check_layers(path, proofs, plan) if plan.layers else []
    for check in checks:
        if check.failure:
            raise BuildError(
                f"The written graph is discarded, because {check.failure}: this is a bug of nbl-export, report it."
            )
    return checks


def _not_finite(part: LinearPart) -> str:
    for value in part.weights:
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(tensor.numpy().astype(np.float32)).all():
            return str(value.name)
    return ""


def _outputs(
    runner: ProbeRunner, parts: Mapping[Block, LinearPart], given: Mapping[Block, Sequence[F32]]
) -> dict[Block, F32]:
    """What each layer writes, [tokens, d], if it is given these rows."""
    if not parts:
        return {}
    result: dict[Block, F32] = {}
    waiting = dict(parts)
    while waiting:
        # Two layers that read one tensor are run one after the other.
        feeds: dict[str, Block] = {}
        for layer, part in waiting.items():
            feeds.setdefault(str(part.reads.name), layer)
        names = {layer: str(parts[layer].output.name) for layer in feeds.values()}
        found = runner.run(list(names.values()), {u: given[layer] for u, layer in feeds.items()})
        for layer, name in names.items():
            result[layer] = runner.joined([row[name] for row in found])
            del waiting[layer]
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
    if len(part.products) != len(factors):
        return LinearCheck(layer, fault=f"it has {len(part.products)} products instead of {len(factors)}")
    if found.shape != (sum(map(len, rows)), len(b)):
        return LinearCheck(layer, fault=f"it writes {list(found.shape)} on the probe")
    if not (np.isfinite(found).all() and np.isfinite(zeros).all()):
        return LinearCheck(layer, fault="what it computes is NaN or infinite")
    kept = [stands_for(w, node) for w, node in zip(factors, part.products, strict=True)]
    exact, stored = (np.concatenate([_through(u, of) for u in rows]) for of in (factors, kept))
    known = np.concatenate([computed(u, kept, part.products, b, part.dtype) for u in rows])
    bias = b.astype(part.dtype.numpy()).astype(np.float32)
    return LinearCheck(
        layer,
        stored=relative_error(stored, exact),
        product=relative_error(found - zeros[:1], stored),
        product_allowed=_FLOAT32 + _ROOM * relative_error(known - bias, stored),
        bias=relative_error(zeros[:1], b[None]),
        bias_allowed=_FLOAT32 + _ROOM * relative_error(bias[None], b[None]),
    )


def _through(u: F32, factors: Sequence[F32]) -> NDArray[np.float32]:
    x = u.astype(np.float64)
    for w in factors:
        x = x @ w.T.astype(np.float64)
    return x.astype(np.float32)
