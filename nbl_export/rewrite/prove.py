"""Prove that the tensors found in a graph are the activations that the linear layers were fitted on.

The graph is run on the plan's probe. The u of a layer must be PyTorch's; then PyTorch's activations are fed at u, with
other tokens at the graph's input, and the y computed from them must be PyTorch's. So y is shown to come from u alone,
and the errors of the layers before do not add up in it. A tensor that merely has similar values, such as the residual
stream one layer on, fails this in any precision.

A graph that is not float32 differs from PyTorch by what its own rounding costs, which is measured: the numbers of its
weights are moved as rounding moves them (:mod:`nbl_export.graph.rounding`), and as far as that moves a tensor, a little
more, the tensor may be from PyTorch's, and over all layers less still. Other weights, if only by the size of that
rounding, are further away.

A mixture of experts is told PyTorch's choices, which are judged by themselves (:mod:`.routers`).

An error is the larger one of two: of all tokens together, and of the median token. A few tokens of massive activations
decide the first alone, and nearly equal tensors of neighbouring layers would pass for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.blocks import Block
from nbl_export.errors import BuildError
from nbl_export.graph.operators import SKIP_NORMS, captured, constant_tensor, key
from nbl_export.graph.precision import Precision, graph_precision
from nbl_export.graph.regions import Output, Region, later_bias
from nbl_export.graph.summary import ProofErrors, ProvenTensors
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.probe_runner import Found, ProbeRunner
from nbl_export.rewrite.routers import load_routed, shortfalls, told_scores

_C = TypeVar("_C")
_INFINITE = float("inf")
_ROUNDING = 1.5
# How much further from PyTorch's a tensor may be than the measured rounding moves it. A right graph's errors were 0.7
# to 1.4 times that.
_ROOM = 1.5
# The same over all layers, in the geometric mean, which scatters less: 0.7 to 1.05 for right graphs.
_ROOM_AS_A_WHOLE = 1.25
# Rounding is one draw of chance, and so is what is measured. In a model of 8 channels one draw is twice another, so the
# largest of a few counts, twice, and layers are not judged as a whole; in a wide one draws are alike, and each costs a
# run of the graph.
_DRAWS, _WIDE, _BY_CHANCE = 4, 64, 2.0
_WHY = "this graph is not of the model the plan was made for: export that model"


@dataclass(frozen=True)
class Tolerance:
    """Relative errors ‖graph - PyTorch‖ / ‖PyTorch‖ up to which u and y are the right tensors."""

    u: float
    y: float


# By the graph's precision: what no right tensor exceeds, however its rounding adds up. What is allowed to the tensors
# of a graph that is not float32 is measured, and never more than this.
PROOF_TOLERANCE = {
    "fp32": Tolerance(1e-3, 1e-3),
    "fp16": Tolerance(3e-2, 3e-2),
    "bf16": Tolerance(1.5e-1, 1.5e-1),
    "int8": Tolerance(0.75, 0.3),
    "int4": Tolerance(0.75, 0.75),
}
# Half of the last bit, beside what is measured: that of the tensor itself, which moved weights do not show.
_LAST_BIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class Proof:
    """One layer's tensors u and y (None if not found), and their relative errors against PyTorch.

    ``shapes`` are those of u on the rows of the probe; ``allowed`` are the errors that the graph's own rounding
    explains.
    """

    layer: Block
    u: ir.Value | None
    y: Output | None
    input_error: float
    output_error: float
    shapes: tuple[tuple[int, ...], ...] = ()
    allowed: Tolerance = field(default=Tolerance(_INFINITE, _INFINITE))

    @property
    def proven(self) -> tuple[ir.Value, Output]:
        """u and y of a proof that holds."""
        assert self.u is not None and self.y is not None
        return self.u, self.y

    @property
    def tensors(self) -> ProvenTensors:
        """The names of u and y, of a proof that holds."""
        u, y = self.proven
        later = str(y.later.name) if y.later else ""
        return ProvenTensors(self.layer, str(u.name), str(y.value.name), later, self.shapes)

    @property
    def errors(self) -> ProofErrors:
        """What a record keeps of it."""
        return ProofErrors(self.layer, self.input_error, self.output_error)

    def limits(self, tolerance: Tolerance) -> Tolerance:
        """The errors up to which it holds."""
        return Tolerance(min(tolerance.u, self.allowed.u), min(tolerance.y, self.allowed.y))

    def holds(self, tolerance: Tolerance) -> bool:
        limits = self.limits(tolerance)
        return self.input_error <= limits.u and self.output_error <= limits.y


def prove(
    path: Path,
    model: ir.Model,
    regions: Sequence[Region],
    plan: Plan,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> dict[Block, Proof]:
    """Proofs of the ``regions`` found in the graph ``model``, which was read from ``path``.

    ``progress`` receives the bytes of the weights that were run. Raises :class:`BuildError` if a layer that is
    to be replaced is not proven.
    """
    precision = graph_precision(model)
    proving = _Proving(path, regions, plan, precision, progress)
    proofs = proving.proofs()
    for number, (short, allowed) in enumerate(proving.routers):
        if not short <= allowed:
            raise BuildError(
                f"The graph is not proven: PyTorch's choices of experts fall short in its router {number} by "
                f"{short:.1e} of a score, more than the {allowed:.1e} that its own rounding explains; {_WHY}."
            )
    for layer in plan.chosen:
        proof, limits = proofs[layer], proofs[layer].limits(PROOF_TOLERANCE[precision.name])
        if not proof.holds(limits):
            raise BuildError(
                f"Layer {layer} is not proven: the graph's tensors differ from PyTorch's by "
                f"{proof.input_error:.1e} (input) and {proof.output_error:.1e} (output), more than "
                f"{limits.u:.2g} and {limits.y:.2g} relative; {_WHY}."
            )
    wide = plan.hidden_size >= _WIDE
    for what, times in _as_a_whole(proofs).items() if wide else ():
        if not times <= _ROOM_AS_A_WHOLE:
            raise BuildError(
                f"The graph is not proven: over all layers its tensors ({what}) differ from PyTorch's by {times:.2f} "
                f"times what its own rounding explains, more than {_ROOM_AS_A_WHOLE:g} times; {_WHY}."
            )
    return proofs


def _as_a_whole(proofs: Mapping[Block, Proof]) -> dict[str, float]:
    """The errors of all layers in units of what rounding explains, in the geometric mean; nothing for float32.

    One layer that stays may be unlike PyTorch's: it counts no more than the most that a layer may have.
    """
    least, all_proofs = PROOF_TOLERANCE["fp32"], proofs.values()
    found = {}
    for what, pairs in (
        ("input", [(p.input_error, p.allowed.u) for p in all_proofs if p.allowed.u > least.u]),
        ("output", [(p.output_error, p.allowed.y) for p in all_proofs if p.allowed.y > least.y]),
    ):
        # Otherwise nothing was measured, or nothing is rounded before it.
        ratios = [min(max(_ROOM * e / most, 1e-3), _ROOM) for e, most in pairs if most < _INFINITE]
        if ratios:
            found[what] = float(np.exp(np.mean(np.log(ratios))))
    return found


class _Proving:
    """Runs a graph on the plan's probe as often as its proofs need it.

    ``routers`` say how far the scores of PyTorch's choices fall short in each, and how far they may.
    """

    def __init__(
        self,
        path: Path,
        regions: Sequence[Region],
        plan: Plan,
        precision: Precision,
        progress: Callable[[int], object],
    ) -> None:
        self.regions, self.plan, self.precision = {r.layer: r for r in regions}, plan, precision
        self.tolerance = PROOF_TOLERANCE[precision.name]
        self.runner = ProbeRunner(path, plan, progress)
        self.scores = told_scores(load_routed(path), plan.probe_routes)
        self.lent = {v for region in regions for v in region.lent}
        self.routers: list[tuple[float, float]] = []
        self.own: Found = []

    def proofs(self) -> dict[Block, Proof]:
        inputs = {
            layer: region.inputs if self.plan.fit_input == "normed" else region.streams
            for layer, region in self.regions.items()
        }
        names = {str(v.name) for v in (*self.lent, *(v for values in inputs.values() for v in values))}
        names |= {str(o.value.name) for region in self.regions.values() for o in region.outputs}
        self.own = self.runner.run(sorted({*names, *self.scores}), {})
        errors: dict[Block, dict[ir.Value, float]] = {
            layer: {v: self.runner.error(_rows(self.own, v), self.plan.probe_u[layer]) for v in values}
            for layer, values in inputs.items()
        }
        candidates = {layer: _nearest(of, self.tolerance.u) for layer, of in errors.items()}
        computed = self._computed(candidates)
        proofs = {}
        for layer, region in self.regions.items():
            least = min(errors[layer].values(), default=_INFINITE)
            proofs[layer] = Proof(layer, None, None, least, _INFINITE)
            if found := self._best(region, candidates[layer], computed):
                u, y, error = found
                shapes = tuple(a.shape for a in _rows(self.own, u))
                proofs[layer] = Proof(layer, u, y, errors[layer][u], error, shapes)
        if self.precision.name == "fp32":
            self.routers = shortfalls(self.scores, self.plan.probe_routes, self.own)
            return proofs
        return self._with_allowed(proofs)

    def _computed(
        self, candidates: Mapping[Block, Sequence[ir.Value]]
    ) -> dict[tuple[Block, ir.Value], Found]:
        """The candidates for y of each layer, computed from PyTorch's activations at each of its candidates for u.

        One run for the first candidate of every layer, one for the second, and so on.
        """
        waiting = [(layer, u) for layer, values in candidates.items() for u in values]
        computed: dict[tuple[Block, ir.Value], Found] = {}
        while waiting:
            fed: dict[Block, ir.Value] = {}
            for layer, u in waiting:
                if layer not in fed and u not in fed.values():
                    fed[layer] = u
            # Fed together, a layer whose y comes from somewhere else would find PyTorch's activations there.
            others = {v for u in fed.values() for v in _entries(u)}
            apart = [i for i, u in fed.items() if not _from_alone(self.regions[i], _entries(u), others)]
            for layers in ([i for i in fed if i not in apart], *([i] for i in apart)):
                group = {i: fed[i] for i in layers}
                names = sorted({str(o.value.name) for i in group for o in self.regions[i].outputs})
                if group:
                    computed |= dict.fromkeys(group.items(), self._run_fed(group, names))
            waiting = [one for one in waiting if one not in computed]
        return computed

    def _run_fed(
        self,
        fed: Mapping[Block, ir.Value],
        names: Sequence[str],
        nudged: int | None = None,
        run: Found | None = None,
    ) -> Found:
        """What each layer computes of PyTorch's activations ``fed`` to it, and of what it was lent in a ``run``."""
        given = {}
        for layer, u in fed.items():
            rows = self.runner.split(self.plan.probe_u[layer], [a.shape for a in _rows(self.own, u)])
            first, *others = _entries(u)
            node = u.producer()
            bias = later_bias(node) if others and node is not None else None
            added = None if bias is None else _constant(bias)
            given[str(first.name)] = rows if added is None else [row - added for row in rows]
            given |= {str(value.name): [np.zeros_like(row) for row in rows] for value in others}
            given |= {str(v.name): _rows(run or self.own, v) for v in self.regions[layer].lent}
        found = self.runner.run([n for n in names if n not in given], given, nudged, other_tokens=True)
        # A tensor that is fed for one layer is nothing that another layer computes.
        return [{**{n: np.full((1, 1), np.nan) for n in names}, **row} for row in found]

    def _best(
        self,
        region: Region,
        candidates: Sequence[ir.Value],
        computed: Mapping[tuple[Block, ir.Value], Found],
    ) -> tuple[ir.Value, Output, float] | None:
        pairs: dict[tuple[ir.Value, Output], float] = {}
        for u in candidates:
            rank = _rows(self.own, u)[0].ndim
            for y in region.outputs:
                if _rows(self.own, y.value)[0].ndim == rank:
                    pairs[u, y] = self._output_error(y, computed[region.layer, u], region.layer)
        near = _nearest(pairs, self.tolerance.y)
        # The product without its bias is not y, even if the values are too inaccurate to show it.
        most = max((y.biases for _, y in near), default=0)
        return next(((u, y, pairs[u, y]) for u, y in near if y.biases == most), None)

    def _output_error(self, output: Output, computed: Found, layer: Block) -> float:
        arrays: Sequence[NDArray[np.float32]] = _rows(computed, output.value)
        if output.later is not None:
            later = _constant(output.later)
            if later is None or later.shape[-1:] != arrays[0].shape[-1:]:  # or it is inside an MLP
                return _INFINITE
            arrays = [a + later for a in arrays]
        return self.runner.error(arrays, self.plan.probe_y[layer])

    def _with_allowed(self, proofs: Mapping[Block, Proof]) -> dict[Block, Proof]:
        """The ``proofs`` with the errors that the graph's own rounding explains."""
        found = {layer: proof.proven for layer, proof in proofs.items() if proof.u is not None}
        if not found:
            return dict(proofs)
        fed = {layer: u for layer, (u, _) in found.items()}
        inputs = sorted({str(v.name) for v in (*fed.values(), *self.lent)})
        outputs = sorted({str(y.value.name) for _, y in found.values()})
        narrow = self.plan.hidden_size < _WIDE
        seeds, room = range(_DRAWS if narrow else 1), _ROOM * (_BY_CHANCE if narrow else 1)
        moved = [self.runner.run([*inputs, *self.scores], {}, nudged=seed) for seed in seeds]
        self.routers = shortfalls(self.scores, self.plan.probe_routes, self.own, moved, room)
        # Each as proven: from the layer's u alone, which the layers before do not change.
        exact = self._run_fed(fed, outputs)
        moved_y = [self._run_fed(fed, outputs, seed, run) for seed, run in zip(seeds, moved, strict=True)]
        least, last_bit = PROOF_TOLERANCE["fp32"], _LAST_BIT.get(self.precision.name, 0.0)

        def allowed(before: Found, draws: Sequence[Found], value: ir.Value, least: float) -> float:
            """What the draw explains that moves ``value`` most."""
            exact = self.runner.joined(_rows(before, value))
            most = max(self.runner.error(_rows(after, value), exact) for after in draws)
            return max(room * most + last_bit, least)

        return {
            **proofs,
            **{
                layer: replace(
                    proofs[layer],
                    allowed=Tolerance(
                        allowed(self.own, moved, u, least.u), allowed(exact, moved_y, y.value, least.y)
                    ),
                )
                for layer, (u, y) in found.items()
            },
        }


def _rows(found: Found, value: ir.Value) -> list[NDArray[np.float32]]:
    return [row[str(value.name)] for row in found]


def _entries(u: ir.Value) -> tuple[ir.Value, ...]:
    """The tensors at which u is fed: u itself, or the two that a fused residual norm adds to it.

    The norm beside such a sum is computed in the same node, and not from the sum.
    """
    node = u.producer()
    if node is None or key(node) not in SKIP_NORMS or u is node.outputs[0]:
        return (u,)
    return tuple(v for v in node.inputs[:2] if v is not None)


def _from_alone(region: Region, own: tuple[ir.Value, ...], fed: set[ir.Value]) -> bool:
    """Whether the outputs of ``region`` are computed from its ``own`` of the ``fed`` tensors, and from no other.

    What is lent to the layer is fed as well.
    """
    stack = [o.value for o in region.outputs if o.value not in own]
    seen: set[ir.Node] = set()
    reached = False
    while stack:
        value = stack.pop()
        if value in fed and value not in own and value not in region.lent:
            return False
        reached |= value in own
        node = None if value in own or value in region.lent else value.producer()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [v for v in (*node.inputs, *captured(node)) if v is not None]
    return reached


def _nearest(errors: Mapping[_C, float], tolerance: float) -> list[_C]:
    """The candidates that are as close as the closest one up to rounding, most likely first.

    A tensor and its Cast differ by rounding only, and that may be the whole error of the Cast.
    """
    near = max(_ROUNDING * min(errors.values(), default=_INFINITE), tolerance / 10)
    return [c for c, error in errors.items() if np.isfinite(error) and error <= near]


def without_later(later: ir.Value | None, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """``values`` of the attention's output minus the bias that is added ``later`` than the proven tensor y."""
    if later is None:
        return values
    bias = _constant(later)
    assert bias is not None  # it was proven with it
    return values - bias


def _constant(value: ir.Value) -> NDArray[np.float32] | None:
    """The values of a constant, or None if they are computed."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy().astype(np.float32)
