"""Low-rank changes of weights that stay: what repair may do to the MLPs beside the linear layers.

A change W + up · down is merged into W, in PyTorch and in the graph, so it costs nothing at run time. The graph's
weight is found by what it is: the plan carries SHA-256 digests of the original W in every precision and orientation
in which an exporter may write it.
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

    They are those of :func:`weight_digests`.
    """

    up: F32
    down: F32
    digests: tuple[str, ...]

    def change(self) -> F32:
        """up · down [m, n]."""
        return self.up @ self.down


def weight_digests(weight: NDArray[Any]) -> tuple[str, ...]:
    """SHA-256 of ``weight`` [m, n] and of its transpose, each in float32, float16 and bfloat16."""
    with np.errstate(over="ignore"):  # what float16 cannot hold is in no float16 graph
        return tuple(
            digest_of(np.ascontiguousarray(turned).astype(dtype))
            for turned in (weight, weight.T)
            for dtype in _DTYPES
        )


def digest_of(array: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).tobytes()).hexdigest()


def is_transposed(adapter: Adapter, digest: str) -> bool:
    """Whether the weight of that ``digest``, one of the adapter's, is the transpose of the model's."""
    return adapter.digests.index(digest) >= len(_DTYPES)


@contextmanager
def adapted(model: torch.nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """``model`` with the ``adapters``, by parameter, merged into its weights, for the length of the block."""
    import torch

    originals: dict[str, torch.Tensor] = {}
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
