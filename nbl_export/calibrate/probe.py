"""A small batch of real text with the activations PyTorch had on it: the evidence for the rewrite.

The graph rewrite must prove, without PyTorch and without the model, that the tensors it found in a
graph are the ones the fit was made for. So calibration keeps, for one ragged left-padded batch, what
each attention layer read and wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.errors import InputError
from nbl_export.models.layers import attention_layers, observed
from nbl_export.runtime.padding import left_padded
from nbl_export.runtime.torch import whole_logits
from nbl_export.tensorfile import load_tensors, save_tensors

if TYPE_CHECKING:
    import torch

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
FORMAT = "nbl-export/probe/1"
_LENGTH = 24


@dataclass(frozen=True)
class Probe:
    """``input_ids``, ``attention_mask``, ``position_ids`` [batch, sequence] int64, and per layer h, x, y.

    The activations are float32 rows [tokens, d] of the unpadded tokens, in batch order: h the
    residual stream, x what the attention reads, y what it writes.
    """

    input_ids: I64
    attention_mask: I64
    position_ids: I64
    h: Mapping[int, F32]
    x: Mapping[int, F32]
    y: Mapping[int, F32]


def probe_model(model: torch.nn.Module, tokens: NDArray[np.int32]) -> Probe:
    """Run ``model`` over the beginning of two rows of ``tokens`` and keep every layer's h, x and y."""
    import torch

    longest = min(_LENGTH, tokens.shape[1])
    rows = [tokens[0][:longest], tokens[1 % len(tokens)][: max(1, longest * 2 // 3)]]
    ids, mask, positions = left_padded(rows)
    kept = torch.from_numpy(mask).bool()
    h: dict[int, F32] = {}
    x: dict[int, F32] = {}
    y: dict[int, F32] = {}

    def observe(index: int, *activations: torch.Tensor) -> None:
        for store, value in zip((h, x, y), activations, strict=True):
            store[index] = value[kept.to(value.device)].float().cpu().numpy()

    with observed(model, attention_layers(model), observe):
        whole_logits(model, ids, mask, positions)
    return Probe(ids, mask, positions, h, x, y)


def save_probe(path: Path, probe: Probe) -> None:
    """Write a probe, atomically."""
    tensors = {name: getattr(probe, name) for name in ("input_ids", "attention_mask", "position_ids")}
    for name in ("h", "x", "y"):
        tensors.update({f"{name}.{i}": value for i, value in getattr(probe, name).items()})
    save_tensors(path, FORMAT, tensors)


def load_probe(path: Path) -> Probe:
    """Read what :func:`save_probe` wrote; raises :class:`InputError` for anything else."""
    tensors, _ = load_tensors(path, FORMAT, CALIBRATE_AGAIN)
    try:
        activations: dict[str, Any] = {"h": {}, "x": {}, "y": {}}
        for key in [k for k in tensors if "." in k]:
            name, index = key.split(".")
            activations[name][int(index)] = tensors.pop(key)
        return Probe(**tensors, **activations)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): {CALIBRATE_AGAIN}.") from None
