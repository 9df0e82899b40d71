"""An encoder in PyTorch or ONNX Runtime: a function from a batch by input name to its outputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch.rows import Inputs
from nbl_export.models.encoder import Encoder
from nbl_export.models.weights import weights_like
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import run_session

Outputs = dict[str, NDArray[np.float32]]


class TorchEncoder:
    """The PyTorch model of ``encoder``, in its state at the time of the call."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, inputs: Inputs) -> Outputs:
        like = weights_like(self.encoder.model)
        given = [
            torch.from_numpy(np.ascontiguousarray(inputs[n])).to(like.device) for n in self.encoder.inputs
        ]
        given = [t.to(like.dtype) if t.is_floating_point() else t for t in given]
        with torch.inference_mode():
            found = self.encoder(*given)
        return {n: t.float().cpu().numpy() for n, t in zip(self.encoder.outputs, found, strict=True)}


class OrtEncoder(OrtModel):
    """The graph at ``path`` in a session (``rounded``, ``small``: :func:`~nbl_export.runtime.session.session`)."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, str] | None = None,
        rounded: bool = True,
        small: bool = False,
    ) -> None:
        super().__init__(path, config, rounded=rounded, small=small)

    def __call__(self, inputs: Inputs) -> Outputs:
        names = self.interface.outputs
        found = run_session(self.session, names, self.interface.named(inputs), self.bounds)
        return {name: np.asarray(a, dtype=np.float32) for name, a in zip(names, found, strict=True)}
