"""Low-rank adapters of retained weights: how a repair changes the subsequent MLPs.

The change W + up · down is merged into W, in PyTorch and in the graph, so it has no cost at run time. The weight is
found in the graph by its content: the plan has SHA-256 digests of the original W in every precision and orientation
that an exporter may use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32

if TYPE_CHECKING:
    import torch

_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Adapter:
    """The change of one weight [m, n]: ``up`` [m, r] · ``down`` [r, n], float32; ``digests`` identify the original.

    The digests are those of :func:`weight_digests`.
    """

    up: F32
    down: F32
    digests: tuple[str, ...]

    def change(self) -> F32:
        """up · down [m, n]."""
        return self.up @ self.down


def weight_digests(weight: NDArray[Any]) -> tuple[str, ...]:
    """SHA-256 of ``weight`` [m, n] and of its transpose, each in float32, float16 and bfloat16."""
    with np.errstate(over="ignore"):  # a weight outside the range of float16 is in no float16 graph
        return tuple(
            digest_of(np.ascontiguousarray(oriented).astype(dtype))
            for oriented in (weight, weight.T)
            for dtype in _DTYPES
        )


def digest_of(array: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).tobytes()).hexdigest()


def is_transposed(adapter: Adapter, digest: str) -> bool:
    """Whether the weight with this ``digest`` of the adapter is the transpose of the model's weight."""
    return adapter.digests.index(digest) >= len(_DTYPES)


@contextmanager
def adapted(model: torch.nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """``model`` with the ``adapters``, by parameter name, merged into its weights, within the block."""
    import torch

    from nbl_export.models.weights import held

    originals: dict[str, torch.Tensor] = {}
    with held(model, adapters):
        try:
            for name, adapter in adapters.items():
                parameter = model.get_parameter(name)
                originals[name] = parameter.data
                change = torch.from_numpy(adapter.change()).to(parameter.device)
                parameter.data = (parameter.data.float() + change).to(parameter.dtype)
            yield
        finally:
            for name, original in originals.items():
                model.get_parameter(name).data = original
