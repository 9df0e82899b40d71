"""Weights of a traced graph that are read when it is written.

A model is traced with tensors that stand for its weights (:func:`nbl_export.models.stand_ins.standing_in`). What the
exporter makes of one, as a transposed matrix or one of a stack, is a view of it: the place in memory says of which
weight, offset and strides say of what part. So the graph gets a tensor that makes the same view of the weight itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nbl_export.models.stand_ins import StandIn


class StandIns:
    """The tensors that stand for weights in a graph that is being made."""

    def __init__(self, stand_ins: Sequence[StandIn]) -> None:
        self._all = [(stand_in.tensor.data_ptr(), stand_in) for stand_in in stand_ins]

    def attach(self, graph: ir.Graph, used: Collection[str]) -> bool:
        """Give the initializers of ``graph`` the weights; whether all that are ``used`` are there.

        One that is not may have been computed with, so the graph is of no use.
        """
        found: set[str] = set()
        for value in graph.initializers.values():
            if value.const_value is not None and (part := self._part(value.const_value.numpy())):
                found.add(part[0].name)
                value.const_value = _view(*part, value.const_value)
        return found >= {stand_in.name for _, stand_in in self._all}.intersection(used)

    def equal(self, a: NDArray[Any], b: NDArray[Any]) -> bool:
        """Whether two arrays have equal numbers; what stands for a weight has those of the weight."""
        ours, theirs = self._part(a), self._part(b)
        if ours is None and theirs is None:
            return np.array_equal(a, b)
        if ours is None or theirs is None or (ours[1], a.shape, a.strides) != (theirs[1], b.shape, b.strides):
            return False
        return ours[0] is theirs[0] or torch.equal(ours[0].stored(), theirs[0].stored())

    def _part(self, array: NDArray[Any]) -> tuple[StandIn, int] | None:
        """The stand-in that ``array`` is a view of, and the offset in bytes; None for any other array."""
        address = array.__array_interface__["data"][0]
        for start, stand_in in self._all:
            if start <= address < start + stand_in.tensor.nbytes:
                return stand_in, address - start
        return None


def _view(stand_in: StandIn, offset: int, tensor: ir.TensorProtocol) -> ir.LazyTensor:
    array = tensor.numpy()
    shape, strides, name = array.shape, array.strides, tensor.name

    def make() -> ir.TensorProtocol:
        whole = stand_in.read().contiguous().cpu().numpy()
        flat = whole.reshape(-1).view(np.uint8)[offset:].view(whole.dtype)
        return ir.tensor(np.lib.stride_tricks.as_strided(flat, shape, strides), name=name)

    # onnx_ir's annotation asks for a class of its own, its code for the protocol.
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)  # type: ignore[arg-type]
