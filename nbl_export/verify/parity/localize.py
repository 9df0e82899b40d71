"""Find the first layer of a rewritten graph that leaves PyTorch: what a failing parity needs next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.batch.rows import real_positions
from nbl_export.blocks import Block, described
from nbl_export.errors import InputError
from nbl_export.graph.cache import LAYERS_KEY, metadata_list
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.summary import DescribedLayer
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.candidates import blocks_of
from nbl_export.models.forward import run_uncached
from nbl_export.models.layers import backbone, observed
from nbl_export.rewrite.probe_runner import relative_error
from nbl_export.rewrite.prove import PROOF_TOLERANCE
from nbl_export.runtime.intermediates import intermediate_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Divergence:
    """The first layer out of tolerance, and where in it: ``"input"`` or ``"output"`` of its attention.

    ``error`` is relative, ``layer`` None if every attention agrees, so that the fault lies after the
    last one (its MLP, the final norm, the head).
    """

    layer: Block | None
    where: str
    kind: str
    error: float

    def __str__(self) -> str:
        if self.layer is None:
            return "every attention layer agrees: the difference arises after the last one (MLP, final norm or head)"
        at = "output" if self.where == "output" else "input, so the cause is before it"
        return (
            f"{described(self.layer)} ({self.kind}) is the first to leave tolerance, at its {at}: "
            f"{self.error:.1e} relative"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def first_divergence(model: torch.nn.Module, plan: Plan, path: Path) -> Divergence:
    """Compare every layer's u and y of the graph at ``path`` with the linearized ``model``, in order."""
    expected: dict[tuple[Block, str], Any] = {}

    def kept(activations: Any) -> Any:
        return activations[real_positions(plan.probe, activations.shape[1])]

    def observe(index: Block, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        u = x if plan.fit_input == "normed" else h
        expected[index, "input"], expected[index, "output"] = (kept(t.cpu().numpy()) for t in (u, y))

    with (
        linearized(model, plan),
        observed(model, blocks_of(model), observe),
    ):
        run_uncached(backbone(model), plan.probe)
    graph = load_graph(path)
    tolerance = PROOF_TOLERANCE[graph_precision(graph).name]
    rows = [row for row in metadata_list(graph, LAYERS_KEY, DescribedLayer) if row.kind != "dropped"]
    found = intermediate_tensors(path, [name for row in rows for name in (row.input, row.output)], plan.probe)
    for row in rows:
        for where, name in (("input", row.input), ("output", row.output)):
            if (row.layer, where) not in expected:
                raise InputError(
                    f"{path} describes a layer {row.layer} that its model has not: rewrite it again."
                )
            error = relative_error(kept(found[name]), expected[row.layer, where])
            if not error <= (tolerance.u if where == "input" else tolerance.y):
                return Divergence(row.layer, where, row.kind, error if np.isfinite(error) else 1e308)
    return Divergence(None, "", "", 0.0)
