"""What a precision costs anyone: PyTorch's own run in it against its float32, with the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbl_export.graph.precision import Precision
from nbl_export.linearize.plan import Plan
from nbl_export.models.load import in_precision
from nbl_export.models.routers import Routers
from nbl_export.models.weights import resident, room
from nbl_export.progress import Listener
from nbl_export.verify.parity.decoder import Recorded, compare
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.reference import record_pytorch

if TYPE_CHECKING:
    import torch

OWN = "PyTorch's own in this precision"


def pytorch_in_precision(
    precision: Precision,
    model: torch.nn.Module,
    plan: Plan,
    rows: Sequence[NDArray[np.int32]],
    steps: int,
    cached: bool = True,
    exact: Recorded | None = None,
    alone: Sequence[NDArray[np.int32]] = (),
    routers: Routers | None = None,
    listener: Listener | None = None,
) -> Parity:
    """The decoder ``model`` in ``precision`` against itself, both by ``plan``, as :func:`.compare_streams` does it.

    ``exact`` is what the model itself gives, if it is known; ``routers`` are those of the half one's run.
    """
    exact = exact or record_pytorch(model, plan, rows, steps, cached, alone, listener=listener)
    half = in_precision(model, precision.gates)
    with resident(half, room(half)):
        found = record_pytorch(half, plan, rows, steps, cached, alone, routers, listener)
    return compare(exact, found, gates_for(precision.gates))
