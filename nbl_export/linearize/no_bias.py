"""Linear layers without b, for readers that add none.

Of all W₀ the one whose W₀ u is closest to W u + b on the calibration tokens is

    W₀ = W + b vᵀ        v = E[uuᵀ]⁻¹ E[u]

For W and b of the LMMSE fit that is the fit without intercept, E[yuᵀ] E[uuᵀ]⁻¹. It costs nothing as far as some
direction of u is constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nbl_export.blocks import Block
from nbl_export.calibrate.moments import LayerMoments, Moments
from nbl_export.errors import InputError
from nbl_export.linearize.lmmse import branch_covariances, constant_direction
from nbl_export.linearize.plan import LinearLayer, Plan


def without_bias(plan: Plan, moments: Moments) -> Plan:
    """``plan`` with W₀ in the place of each W, and b = 0. Raises :class:`InputError` without a layer's moments."""
    layers: Mapping[Block, LayerMoments] = moments.layers
    if gone := [block for block in plan.layers if block not in layers]:
        raise InputError(f"There are no moments of layer {gone[0]}: run `nbl-export calibrate` again.")
    made = {}
    for block, one in plan.layers.items():
        v = constant_direction(branch_covariances(layers[block], plan.fit_input))
        w = one.w + np.outer(one.b, v)
        made[block] = LinearLayer(w.astype(np.float32), np.zeros_like(one.b))
    return replace(plan, layers=made, rank=None, ranks={})
