"""Make tensors that stand for the weights of a model, for whatever does not look at their numbers: a trace of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nbl_export.models.weights import Read, acquired, streaming_of

# Bytes of a weight that is worth a stand-in. Exporters compare what is much smaller by its numbers.
_LARGE = 1 << 16


@dataclass(frozen=True)
class StandIn:
    """A tensor that stands for a weight, of its shape and dtype, without its numbers.

    ``read`` gives the weight, ``stored`` gives it as it is stored.
    """

    name: str
    tensor: torch.Tensor
    read: Read
    stored: Read


@contextmanager
def standing_in(model: torch.nn.Module) -> Iterator[list[StandIn]]:
    """Within the block, the weights of ``model`` are there for whatever does not look at their numbers: a trace of it.

    Matrices are tensors over a file without content, which takes neither memory nor disk; what is small is real. An
    ordinary model is not changed: the list is empty.
    """
    streaming = streaming_of(model)
    if streaming is None:
        yield []
        return
    weights = streaming.every()
    large = [w for w in weights if w.bytes >= _LARGE and len(w.shape) > 1 and not w.users]
    found: list[StandIn] = []
    with (
        tempfile.TemporaryDirectory(prefix="nbl-export.") as folder,
        acquired(streaming, [w for w in weights if all(w is not other for other in large)]),
    ):
        for number, weight in enumerate(large):
            path, count = Path(folder) / str(number), math.prod(weight.shape)
            with path.open("wb") as file:
                file.truncate(count * streaming.dtype.itemsize)
            tensor = torch.from_file(str(path), shared=True, size=count, dtype=streaming.dtype)
            tensor = tensor.view(weight.shape)
            streaming.put(weight, tensor)
            weight.users += 1
            found.append(StandIn(weight.name, tensor, partial(streaming.value, weight), weight.read))
        try:
            yield found
        finally:
            streaming.release(large)
