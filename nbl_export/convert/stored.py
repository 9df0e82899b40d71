"""What a GGUF file stores of the plan: each W as far as its format is exact, each b as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block
from nbl_export.checks import Check
from nbl_export.convert.deci import blocks_of
from nbl_export.linearize.plan import Plan

# The largest error of a number, over the largest of its 32 neighbours: half a step of the format, and that of a scale.
_HALF_STEP = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}
_AROUND = 32


def check_stored(path: Path, plan: Plan) -> Check:
    """Whether the file at ``path`` has W and b of every linear layer of ``plan``."""
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    worst = 0.0
    for number, block in enumerate(blocks_of(plan)):
        if block.linear is None:
            continue
        own = plan.layers[block.linear]
        w = tensors.get(f"blk.{number}.attn_output.weight")
        b = tensors.get(f"blk.{number}.ffn_down.bias")
        if w is None or b is None:
            return _failed(block.linear, "is not in the file")
        error = _error(dequantize(w.data, w.tensor_type), own.w)
        if not error <= _HALF_STEP[w.tensor_type.name] * 1.01:
            return _failed(block.linear, f"has W that is off by {error:.2g} of the largest number near it")
        if not np.array_equal(dequantize(b.data, b.tensor_type), own.b):
            return _failed(block.linear, "has another b")
        worst = max(worst, error)
    exact = "exactly" if worst == 0 else f"to {worst:.2g} of the largest number near each"
    return Check("linear layers", "passed", f"W and b of {len(plan.layers)} are in the file, W {exact}")


def _failed(block: Block, what: str) -> Check:
    return Check("linear layers", "failed", f"layer {block} {what}")


def _error(stored: F32, w: F32) -> float:
    """The largest error, over the largest number of the 32 that a format may scale together."""
    if stored.shape != w.shape:
        return float("inf")
    width = _AROUND if w.shape[1] % _AROUND == 0 else w.shape[1]
    rows = w.reshape(-1, width)
    off = np.abs(stored.reshape(-1, width) - rows)
    return float(np.max(off / np.maximum(np.abs(rows).max(1, keepdims=True), np.finfo(np.float32).tiny)))
