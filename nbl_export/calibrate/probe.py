"""The probe: a small batch of real text or images with PyTorch's activations on it, for the proof of the rewrite.

The graph rewrite must prove, without PyTorch and without the model, that the tensors it found in a graph are those
that the linear layers were fitted on. So calibration saves the inputs and outputs of each attention layer for one
ragged padded batch or a few images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import F32, I64, MASK, POSITIONS, TOKENS, Inputs, left_padded, real_positions
from nbl_export.blocks import ATTENTION, Block, block_of, part_of
from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.errors import NblError
from nbl_export.models.attention import Routers
from nbl_export.models.candidates import blocks_of
from nbl_export.models.dummy_run import unrunnable
from nbl_export.models.forward import run_uncached
from nbl_export.models.layers import backbone, hidden_size, layer_count
from nbl_export.models.lengths import BEYOND, lengths
from nbl_export.models.running import observed
from nbl_export.tensorfile import load_tensors, save_tensors

FORMAT = "nbl-export/probe/1"
_LENGTH, _ROUTES = 24, "routes"
# Bytes of the activations on a row that goes beyond a length of the model: what is longer, parity crosses alone.
_BYTES = 64 << 20


@dataclass(frozen=True)
class Probe:
    """``inputs``, the batch by input name, and per layer h, x, y.

    The activations are float32 [tokens, d] of the unpadded tokens, in batch order: h is the residual stream, x the
    input of the attention, y its output. ``routes`` are the places [tokens, …, k] that each router of a mixture of
    experts chose, by its number in the model.
    """

    inputs: Inputs
    h: Mapping[Block, F32]
    x: Mapping[Block, F32]
    y: Mapping[Block, F32]
    routes: Mapping[int, I64] = field(default_factory=dict)


def probe_lengths(width: int, beyond: int = 0) -> tuple[int, int]:
    """The lengths of the two rows of a text probe, cut from rows of ``width`` tokens; one is ``beyond``, if it can."""
    usual = min(_LENGTH, width)
    return min(max(_LENGTH, beyond), width), max(1, usual * 2 // 3)


def tokens_beyond(model: torch.nn.Module) -> int:
    """The tokens of a row that goes beyond the model's lengths, as far as the activations on it are small."""
    token = 3 * 4 * hidden_size(model) * layer_count(model)
    longer = [length.tokens + BEYOND for length in lengths(model)]
    return max((tokens for tokens in longer if tokens * token <= _BYTES), default=0)


def probe_model(
    model: torch.nn.Module, tokens: NDArray[np.int32], parts: Collection[str] = (ATTENTION,)
) -> Probe:
    """Run the decoder ``model`` over the beginning of two rows of ``tokens``, as :func:`probe_inputs` does."""
    longest, shorter = probe_lengths(tokens.shape[1], tokens_beyond(model))
    # Here the longest row of a batch may decide for both, and the graph is run row by row.
    if any(length.batch and shorter <= length.tokens < longest for length in lengths(model)):
        shorter = longest
    wanted = (longest, shorter)
    rows = [tokens[i % len(tokens)][:length] for i, length in enumerate(wanted)]
    return probe_inputs(model, dict(zip((TOKENS, MASK, POSITIONS), left_padded(rows), strict=True)), parts)


def probe_inputs(model: torch.nn.Module, inputs: Inputs, parts: Collection[str] = (ATTENTION,)) -> Probe:
    """Run ``model`` over one batch and record h, x and y at positions without padding.

    They are those of every attention layer, also of those that are no candidates, and with ``parts`` that have MLPs of
    every MLP.
    """
    h: dict[Block, F32] = {}
    x: dict[Block, F32] = {}
    y: dict[Block, F32] = {}

    def observe(index: Block, *activations: torch.Tensor) -> None:
        real = torch.from_numpy(real_positions(inputs, activations[0].shape[1]))
        for store, value in zip((h, x, y), activations, strict=True):
            store[index] = value[real.to(value.device)].float().cpu().numpy()

    routers = Routers([real_positions(inputs, inputs[TOKENS].shape[1])] if TOKENS in inputs else [])
    routers.begin()
    wanted = [one for one in blocks_of(model) if part_of(one.index) in {ATTENTION, *parts}]
    with observed(model, wanted, observe), routers:
        try:
            run_uncached(backbone(model), inputs)
        except NblError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:  # of the model's own code
            raise unrunnable(model, error) from error
    routes = enumerate(routers.chosen()[0] if routers.passes else [])
    return Probe(inputs, h, x, y, {number: taken for number, taken in routes if taken is not None})


def save_probe(path: Path, probe: Probe) -> None:
    """Write a probe, atomically."""
    tensors = dict(probe.inputs)
    for name in ("h", "x", "y"):
        tensors.update({f"{name}.{i}": value for i, value in getattr(probe, name).items()})
    tensors.update({f"{_ROUTES}.{i}": value for i, value in probe.routes.items()})
    save_tensors(path, FORMAT, tensors)


def load_probe(path: Path) -> Probe:
    """Read what :func:`save_probe` wrote; raises :class:`InputError` for anything else."""
    tensors, _ = load_tensors(path, FORMAT, CALIBRATE_AGAIN)
    found: dict[str, Any] = {"h": {}, "x": {}, "y": {}, _ROUTES: {}}
    for key in [k for k in tensors if "." in k]:
        name, index = key.split(".", 1)
        found[name][block_of(index)] = tensors.pop(key)
    return Probe(tensors, **found)
