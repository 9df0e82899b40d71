"""Merge a plan's low-rank adapters into the weights of a graph.

    before                          after
    x ─► MatMul(Wᵀ) ─► …            x ─► MatMul((W + up · down)ᵀ) ─► …

1. *Find.* A weight is found by its bytes, in any precision and orientation the exporter may have used.
2. *Count.* Each must be found exactly once. A quantized graph contains none of them and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.errors import BuildError
from nbl_export.graph.io import Slot, slots
from nbl_export.linearize.plan import Adapter, digest_of, is_transposed


def merge_adapters(model: ir.Model, adapters: Mapping[str, Adapter]) -> None:
    """Change the weights of ``model`` in place; raises :class:`BuildError` if one is not found exactly once."""
    wanted = {digest: name for name, adapter in adapters.items() for digest in adapter.digests}
    sizes = [sorted((a.up.shape[0], a.down.shape[1])) for a in adapters.values()]
    found: dict[str, list[tuple[Slot, str]]] = {name: [] for name in adapters}
    for slot in slots(model) if adapters else ():
        if (
            sorted(slot.tensor.shape.numpy()) in sizes
            and (digest := digest_of(slot.tensor.numpy())) in wanted
        ):
            found[wanted[digest]].append((slot, digest))
    for name, matches in found.items():
        if len(matches) != 1:
            raise BuildError(
                f"The plan's repair changes the weight {name}, which the graph contains {len(matches)} times instead "
                "of once (a quantized graph contains none): select with --repair-rank 0, or export in fp32, fp16 or "
                "bf16."
            )
        slot, digest = matches[0]
        slot.put(_merged(slot.tensor, adapters[name], digest))


def _merged(tensor: ir.TensorProtocol, adapter: Adapter, digest: str) -> ir.TensorProtocol:
    """The changed weight, computed when it is written."""

    def compute() -> ir.TensorProtocol:
        original: NDArray[Any] = tensor.numpy()
        change = adapter.change()
        changed = original.astype(np.float32) + (change.T if is_transposed(adapter, digest) else change)
        return ir.tensor(changed.astype(original.dtype), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=tensor.name)
