"""Run the model over calibration tokens or images and collect its moments, with checkpoints.

1. Forward hooks on the model's attention modules read h, x and y; the model is not changed.
2. Memory is one batch and the accumulators, for any number of tokens.
3. A checkpoint is written only between batches, so that every layer has seen the same tokens. Batches and
   their order depend only on the tokens: a resumed run gives the same sums, bit for bit.
4. The first Ctrl-C (or SIGTERM) finishes the batch, writes a checkpoint and stops; the second stops at once,
   and the last checkpoint remains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.calibrate.moments import Accumulator, Moments, digest_of_tokens, load_moments, save_moments
from nbl_export.checkpoint import Checkpoint, saving_to
from nbl_export.errors import CalibrationError, InputError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import (
    AttentionLayer,
    accepted_arguments,
    attention_layers,
    dtype_of,
    hidden_size,
    main_input,
    observed,
)
from nbl_export.models.partial_forward import backbone
from nbl_export.progress import Listener, Silent

if TYPE_CHECKING:
    import torch

# About this many tokens per forward pass: enough for the full GEMM rate, small enough for the CPU caches.
_BATCH_TOKENS = 1024


def collect_moments(
    model: torch.nn.Module,
    tokens: NDArray[np.int32] | NDArray[np.float32],
    fingerprint: str,
    checkpoint: Checkpoint | None = None,
    listener: Listener | None = None,
) -> Moments:
    """The moments of every attention layer of ``model`` over ``tokens`` [samples, seq_len] or images.

    Images are pixels [samples, channels, height, width]; each counts as the number of tokens the model makes of it.

    ``fingerprint`` identifies the model and whatever else the moments are of; a checkpoint of another one, of another
    dtype or text is ignored. Raises
    :class:`CalibrationError` naming the layer if an activation is NaN or infinite, and ``KeyboardInterrupt`` after
    an interrupt, with its work saved.
    """
    import torch

    listener = listener or Silent()
    layers = attention_layers(model)
    device = next(model.parameters()).device
    accumulators = {layer.index: Accumulator(hidden_size(model), device) for layer in layers}
    identity = {"model": fingerprint, "dtype": dtype_of(model), "tokens": digest_of_tokens(tokens)}
    done = _resume(checkpoint, identity, accumulators, listener)
    rows = len(tokens)
    length = tokens.shape[1] if tokens.ndim == 2 else dummy_run(model).tokens
    step = max(1, _BATCH_TOKENS // length)
    run: Any = backbone(model)
    kind = np.int64 if tokens.ndim == 2 else np.float32

    def observe(index: int, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        accumulators[index].add(h, x, y)

    def save(path: Path) -> None:
        partial = Moments({i: a.result() for i, a in accumulators.items()})
        save_moments(path, partial, {**identity, "rows": done})

    with (
        listener.task("Calibrating", rows * length, "tokens", done * length) as task,
        observed(model, layers, observe),
        torch.inference_mode(),
        saving_to(checkpoint, save) as between,
    ):
        while done < rows:
            batch = torch.from_numpy(tokens[done : done + step].astype(kind)).to(device)
            run(**{main_input(model): batch}, **accepted_arguments(run, use_cache=False))
            _check_finite(accumulators, layers, done)
            done += len(batch)
            task.advance(len(batch) * length)
            between()
    return Moments({i: a.result() for i, a in accumulators.items()})


def _resume(
    checkpoint: Checkpoint | None,
    identity: dict[str, str],
    accumulators: dict[int, Accumulator],
    listener: Listener,
) -> int:
    if checkpoint is None or not checkpoint.path.exists():
        return 0
    try:
        moments, metadata = load_moments(checkpoint.path)
    except InputError:
        listener.note(f"The checkpoint {checkpoint.path.name} is damaged and was ignored.")
        return 0
    rows = metadata.pop("rows", 0)
    if metadata != identity or set(moments.layers) != set(accumulators):
        return 0
    for index, layer in moments.layers.items():
        accumulators[index].restore(layer)
    listener.note(f"Calibration goes on from a checkpoint at {rows} rows.")
    return int(rows)


def _check_finite(accumulators: dict[int, Accumulator], layers: tuple[AttentionLayer, ...], row: int) -> None:
    for layer in layers:
        if not accumulators[layer.index].is_finite():
            raise CalibrationError(
                f"The activations of layer {layer.index} ({layer.attention}) are NaN or infinite, first seen in "
                f"the batch at calibration row {row}, so nothing can be fitted to them: check the model's weights, or "
                "use --calibration-dtype float32."
            )
