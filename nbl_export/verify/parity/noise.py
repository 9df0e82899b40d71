"""How far rounding alone moves a model: the scale below which no parity can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.padding import left_padded
from nbl_export.runtime.torch import uncached_logits

if TYPE_CHECKING:
    import torch

_LAST_BIT = 2.0**-24  # relative, half a unit in the last place of float32


def rounding_noise(model: torch.nn.Module, rows: Sequence[NDArray[np.int32]], seed: int = 0) -> float:
    """Largest |Δlogit| of a prefill of ``rows`` when every embedding entry moves by its last bit.

    The signs are random for ``seed``. A well-conditioned float32 model gives about 1e-4.
    """
    import torch

    inputs = left_padded(list(rows))
    kept = inputs[1].astype(bool)
    generator = torch.Generator().manual_seed(seed)

    def disturb(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + signs * 2 * _LAST_BIT)

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    exact = uncached_logits(model, *inputs)[kept]
    hook = embeddings.register_forward_hook(disturb)
    try:
        disturbed = uncached_logits(model, *inputs)[kept]
    finally:
        hook.remove()
    return float(np.abs(exact - disturbed).max())
