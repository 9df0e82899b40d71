"""Prove that the tensors found in a graph are the activations the fit was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import BuildError
from nbl_export.graph.regions import AttentionRegion
from nbl_export.linearize.plan import Plan
from nbl_export.runtime.ort import run_taps

# Relative error ‖graph - PyTorch‖ / ‖PyTorch‖ up to which a tensor is the right one, by the graph's
# precision: rounding makes 1e-6, 3e-3 and 2e-2 of it in a deep model, a wrong tensor about 1.
PROOF_TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1.5e-1}


@dataclass(frozen=True)
class Proof:
    """Relative errors of one layer's input u and output y against PyTorch, on the plan's probe."""

    layer: int
    input_error: float
    output_error: float

    def holds(self, tolerance: float) -> bool:
        return max(self.input_error, self.output_error) <= tolerance


def prove(
    path: Path, regions: Sequence[AttentionRegion], plan: Plan, tolerance: float = PROOF_TOLERANCE["fp32"]
) -> dict[int, Proof]:
    """Run the graph at ``path`` on the probe and compare u and y of each region with the plan's.

    Raises :class:`BuildError` if a layer that is to be replaced is not proven.
    """
    inputs = {r.layer: input_of(r, plan) for r in regions}
    names = [str(v) for r in regions for v in (inputs[r.layer], r.y.name) if v]
    values = run_taps(path, names, plan.probe)
    kept = plan.probe["attention_mask"].astype(bool)
    proofs = {}
    for region in regions:
        name = inputs[region.layer]
        proofs[region.layer] = Proof(
            region.layer,
            relative_error(values[name], plan.probe_u[region.layer], kept) if name else float("inf"),
            relative_error(values[str(region.y.name)], plan.probe_y[region.layer], kept),
        )
    for layer in plan.chosen:
        proof = proofs[layer]
        if not proof.holds(tolerance):
            raise BuildError(
                f"Layer {layer} is not proven: the graph's tensors differ from PyTorch's by "
                f"{proof.input_error:.1e} (input) and {proof.output_error:.1e} (output), more than "
                f"{tolerance:g} relative; this graph is not of the model the plan was made for."
            )
    return proofs


def input_of(region: AttentionRegion, plan: Plan) -> str | None:
    """The name of the tensor the plan's W reads in this region; None if the region has none."""
    value = region.x if plan.fit_input == "normed" else region.h
    return str(value.name) if value is not None else None


def relative_error(
    found: NDArray[np.float32], expected: NDArray[np.float32], kept: NDArray[np.bool_]
) -> float:
    """‖found - expected‖ / ‖expected‖ of the unpadded tokens; infinite for NaN or another shape.

    ``found`` is [batch, sequence, d], ``kept`` [batch, sequence] marks real tokens, ``expected`` is
    [real tokens, d].
    """
    rows = found[kept].astype(np.float64)
    if rows.shape != expected.shape:
        return float("inf")
    norm = float(np.linalg.norm(expected)) or 1.0
    with np.errstate(invalid="ignore"):  # infinity minus infinity, which counts as infinite below
        error = float(np.linalg.norm(rows - expected) / norm)
    return error if np.isfinite(error) else float("inf")


def proofs_as_json(proofs: Mapping[int, Proof]) -> list[dict[str, float | int]]:
    return [
        {"layer": p.layer, "input_error": p.input_error, "output_error": p.output_error}
        for p in proofs.values()
    ]
