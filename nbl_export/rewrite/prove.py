"""Prove that the tensors found in a graph are the activations that the linear layers were fitted on.

A graph with floating-point weights is run on the plan's probe. Of each layer's candidates the one closest to
PyTorch's activations is used, and its error must be within the tolerance.

The activations of a graph with quantized weights differ from PyTorch's after a few layers, although it is the
same model. There each layer is proven by itself: PyTorch's activations are fed at u, and the y computed from
them must match PyTorch's. The graph's own u must still be similar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.names import TOKENS
from nbl_export.batch.rows import rows_of_batch
from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import Precision, graph_precision
from nbl_export.graph.regions import AttentionRegion, Output
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.summary import ProofErrors
from nbl_export.runtime.intermediates import Arrays, compute_tensors, prefill_rows, unbatched

_C = TypeVar("_C")
_ROUNDING = 1.5


@dataclass(frozen=True)
class Tolerance:
    """Relative errors ‖graph - PyTorch‖ / ‖PyTorch‖ up to which u and y are the right tensors."""

    u: float
    y: float


# By the graph's precision. Rounding causes errors of 1e-6 (fp32), 3e-3 (fp16) and 2e-2 (bf16) in a deep model;
# a wrong tensor has an error of 1 or more. Quantized: y is computed by one layer from the right u. In a model
# of 135M parameters with 4-bit blocks its error is 0.07 to 0.51, and that of the closest wrong layer 1.01.
PROOF_TOLERANCE = {
    "fp32": Tolerance(1e-3, 1e-3),
    "fp16": Tolerance(3e-2, 3e-2),
    "bf16": Tolerance(1.5e-1, 1.5e-1),
    "int8": Tolerance(0.75, 0.3),
    "int4": Tolerance(0.75, 0.75),
}


@dataclass(frozen=True)
class Proof:
    """One layer's tensors u and y (None if not found), and their relative errors against PyTorch.

    ``shapes`` are those of u on the rows of the probe.
    """

    layer: int
    u: ir.Value | None
    y: Output | None
    input_error: float
    output_error: float
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def errors(self) -> ProofErrors:
        """What a record keeps of it."""
        return ProofErrors(self.layer, self.input_error, self.output_error)

    def holds(self, tolerance: Tolerance) -> bool:
        return self.input_error <= tolerance.u and self.output_error <= tolerance.y


def prove(
    path: Path,
    model: ir.Model,
    regions: Sequence[AttentionRegion],
    plan: Plan,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> dict[int, Proof]:
    """Proofs of the ``regions`` found in the graph ``model``, which was read from ``path``.

    ``progress`` receives the bytes of the weights that were run. Raises :class:`BuildError` if a layer that is
    to be replaced is not proven.
    """
    precision = graph_precision(model)
    tolerance = PROOF_TOLERANCE[precision.name]
    runner = _ProbeRunner(path, plan, progress)
    names = {str(v.name) for r in regions for v in (*_inputs(r, plan), *(o.value for o in r.outputs))}
    found = runner.run(sorted(names), {}) if names else []
    proofs = {region.layer: _proof(region, plan, runner, found, precision) for region in regions}
    for layer in plan.chosen:
        proof = proofs[layer]
        if not proof.holds(tolerance):
            raise BuildError(
                f"Layer {layer} is not proven: the graph's tensors differ from PyTorch's by "
                f"{proof.input_error:.1e} (input) and {proof.output_error:.1e} (output), more than "
                f"{tolerance.u:g} and {tolerance.y:g} relative; this graph is not of the model the plan was made for: "
                "export that model."
            )
    return proofs


def confirm(path: Path, proofs: Mapping[int, Proof], plan: Plan, outputs: Mapping[int, str]) -> None:
    """Check that the linear layers of the graph written to ``path`` compute W u + b.

    ``outputs`` names the tensor that each writes. Raises :class:`BuildError` if one does not.
    """
    if not outputs:
        return
    tolerance = PROOF_TOLERANCE[graph_precision(load_graph(path)).name]
    runner = _ProbeRunner(path, plan)
    given = {}
    for layer in outputs:
        proof = proofs[layer]
        assert proof.u is not None  # proven layers have one
        given[str(proof.u.name)] = runner.split(plan.probe_u[layer], proof.shapes)
    found = runner.run(list(outputs.values()), given)
    for layer, name in outputs.items():
        linear = plan.layers[layer]
        expected = plan.probe_u[layer] @ linear.w.T + linear.b
        y = proofs[layer].y
        assert y is not None  # proven layers have one
        error = runner.error([row[name] for row in found], without_later(y, expected))
        if not error <= tolerance.y:
            raise BuildError(
                f"The linear layer {layer} of the written graph differs by {error:.1e} from W u + b, more than "
                f"{tolerance.y:g} relative, so the graph is discarded: this is a bug of nbl-export, report it."
            )


def _inputs(region: AttentionRegion, plan: Plan) -> tuple[ir.Value, ...]:
    return region.inputs if plan.fit_input == "normed" else region.streams


class _ProbeRunner:
    """Runs the graph on the probe: from its inputs, or from activations that are fed to a layer."""

    def __init__(
        self, path: Path, plan: Plan, progress: Callable[[int], object] = lambda _bytes: None
    ) -> None:
        self.path, self.plan, self.progress = path, plan, progress
        self.rows = rows_of_batch(plan.probe)
        self.lengths = [row[TOKENS].shape[1] if TOKENS in row else self._image() for row in self.rows]

    def _image(self) -> int:
        """Number of tokens per image."""
        return len(next(iter(self.plan.probe_y.values()))) // len(self.rows)

    def run(self, names: Sequence[str], given: Mapping[str, Sequence[NDArray[Any]]]) -> list[Arrays]:
        """Tensors ``names`` for each row; the intermediate tensors ``given`` are fed instead of computed."""
        model = load_graph(self.path)
        feeds: list[Arrays] = prefill_rows(model, self.rows)
        for name, arrays in given.items():
            for feed, array in zip(feeds, arrays, strict=True):
                feed[name] = array
        return compute_tensors(model, names, feeds, progress=self.progress)

    def split(
        self, activations: NDArray[np.float32], shapes: Sequence[tuple[int, ...]]
    ) -> list[NDArray[np.float32]]:
        """``activations`` [unpadded tokens, d] row by row, in ``shapes``."""
        ends = np.cumsum(self.lengths)[:-1]
        return [p.reshape(s) for p, s in zip(np.split(activations, ends), shapes, strict=True)]

    def error(self, arrays: Sequence[NDArray[Any]], expected: NDArray[np.float32]) -> float:
        rows = [unbatched(a, length) for a, length in zip(arrays, self.lengths, strict=True)]
        if any(r.ndim != 2 or r.shape[1] != expected.shape[1] for r in rows):
            return float("inf")
        return relative_error(np.concatenate(rows), expected)


def _proof(
    region: AttentionRegion, plan: Plan, runner: _ProbeRunner, found: Sequence[Arrays], precision: Precision
) -> Proof:
    layer = region.layer
    tensors = {name: [row[name] for row in found] for name in found[0]}
    ranks = {name: arrays[0].ndim for name, arrays in tensors.items()}
    errors = {v: runner.error(tensors[str(v.name)], plan.probe_u[layer]) for v in _inputs(region, plan)}
    tolerance = PROOF_TOLERANCE[precision.name]
    pairs: dict[tuple[ir.Value, Output], float] = {}
    for u in _nearest(errors, tolerance.u):
        name = str(u.name)
        computed = _given(region, plan, runner, u, tensors[name]) if precision.quantized else tensors
        for y in region.outputs:
            if ranks[str(y.value.name)] == ranks[name]:
                pairs[u, y] = _output_error(y, computed, runner, plan.probe_y[layer])
    near = _nearest(pairs, tolerance.y)
    if not near:
        return Proof(layer, None, None, min(errors.values(), default=float("inf")), float("inf"))
    # The product without its bias is not y, even if the values are too inaccurate to show it.
    most = max(y.biases for _, y in near)
    u, y = next(pair for pair in near if pair[1].biases == most)
    shapes = tuple(a.shape for a in tensors[str(u.name)])
    return Proof(layer, u, y, errors[u], pairs[u, y], shapes)


def _nearest(errors: Mapping[_C, float], tolerance: float) -> list[_C]:
    """The candidates that are as close as the closest one up to rounding, most likely first.

    A tensor and its Cast differ by rounding only, and that may be the whole error of the Cast.
    """
    least = min(errors.values(), default=float("inf"))
    near = max(_ROUNDING * least, tolerance / 10)
    return [c for c, error in errors.items() if np.isfinite(error) and error <= near]


def _given(
    region: AttentionRegion, plan: Plan, runner: _ProbeRunner, u: ir.Value, like: Sequence[NDArray[Any]]
) -> dict[str, list[NDArray[Any]]]:
    """The candidates for y, computed from PyTorch's activations fed at ``u``."""
    names = sorted({str(o.value.name) for o in region.outputs})
    shapes = [a.shape for a in like]
    rows = runner.run(names, {str(u.name): runner.split(plan.probe_u[region.layer], shapes)})
    return {name: [row[name] for row in rows] for name in names}


def _output_error(
    output: Output,
    computed: Mapping[str, Sequence[NDArray[Any]]],
    runner: _ProbeRunner,
    y: NDArray[np.float32],
) -> float:
    arrays = computed[str(output.value.name)]
    if output.later is not None:
        later = constant_array(output.later)
        if later is None:
            return float("inf")
        arrays = [a + later for a in arrays]
    return runner.error(arrays, y)


def without_later(y: Output, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """``values`` of the attention's output minus the bias that is added after the proven tensor ``y``."""
    if y.later is None:
        return values
    later = constant_array(y.later)
    assert later is not None  # it was proven with it
    return values - later


def constant_array(value: ir.Value) -> NDArray[np.float32] | None:
    """The values of a constant, or None if they are computed."""
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        (attribute,) = producer.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
        elif attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            return np.array(attribute.value, dtype=np.float32)
    return None if tensor is None else tensor.numpy().astype(np.float32)


def relative_error(found: NDArray[Any], expected: NDArray[np.float32]) -> float:
    """‖found - expected‖ / ‖expected‖, both [tokens, d]; infinite for NaN or another shape."""
    if found.shape != expected.shape:
        return float("inf")
    norm = float(np.linalg.norm(expected)) or 1.0
    with np.errstate(invalid="ignore"):  # infinity minus infinity, which counts as infinite below
        error = float(np.linalg.norm(found.astype(np.float64) - expected) / norm)
    return error if np.isfinite(error) else float("inf")
