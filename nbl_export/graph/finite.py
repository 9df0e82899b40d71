"""Weights that are NaN or infinite: a graph that has them is refused by their name before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.errors import InputError
from nbl_export.graph.half_emulation import HALF
from nbl_export.graph.operators import LINEAR, SKIP_NORMS, key

# The bits of an exponent that is all ones: infinity, or with other bits NaN.
_EXPONENT = {ir.DataType.FLOAT16: 0x7C00, ir.DataType.BFLOAT16: 0x7F80}
_PART = 1 << 22  # numbers that are looked at together
# What multiplies or scales by a weight. Elsewhere minus infinity has a use: masks add it.
_OTHERS = frozenset(
    {"GatherBlockQuantized", "DequantizeLinear", "Conv", "RMSNormalization", "LayerNormalization"}
    | {"SimplifiedLayerNormalization"}
)
# Rows are looked up of embeddings, which norms square or scale, and of tables of masks, which are added.
_LOOKS_UP = "Gather"
_SCALES = ("Mul", "Pow")
_PASSES_ON = ("Transpose", "Reshape", "Cast", "Identity", _LOOKS_UP)


def check_finite(model: ir.Model, where: str) -> None:
    """Raise :class:`InputError` if a weight of ``model`` is NaN, or infinite where that makes no sense."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not (value.dtype == ir.DataType.FLOAT or value.dtype in HALF):
            continue
        flat = tensor.numpy().reshape(-1)
        parts = (flat[start : start + _PART] for start in range(0, flat.size, _PART))
        if not any(_bad(part, value.dtype).any() for part in parts):
            continue
        bad = _bad(tensor.numpy(), value.dtype)
        values = tensor.numpy().astype(np.float32)
        nan = bool(np.isnan(values).any())
        if nan or _is_weight(value, bool((values == np.inf).any())):
            reader = next((use.node for use in value.uses()), None)
            node = f", which {reader.op_type} ({reader.name}) reads," if reader is not None else ""
            raise InputError(
                f"{where} cannot be used: its weight {value.name}{node} is {'NaN' if nan else 'infinite'} at "
                f"{int(bad.sum()):,} of {bad.size:,} places; export it from a sound model."
            )


def _bad(array: NDArray[Any], dtype: ir.DataType | None) -> NDArray[np.bool_]:
    if dtype in _EXPONENT:
        bits = _EXPONENT[dtype]
        found: NDArray[np.bool_] = (np.ascontiguousarray(array).view(np.uint16) & bits) == bits
        return found
    other: NDArray[np.bool_] = ~np.isfinite(array)
    return other


def _is_weight(value: ir.Value, positive: bool) -> bool:
    """Whether an infinite number of ``value`` is wrong where it is read; ``positive``: one of them is above zero."""
    stack, seen = [(value, False)], set()
    while stack:
        current, looked_up = stack.pop()
        for use in current.uses():
            node = use.node
            looks_up = node.op_type == _LOOKS_UP
            if key(node) in LINEAR or key(node) in SKIP_NORMS or node.op_type in _OTHERS:
                return True
            if (looks_up and positive) or (looked_up and node.op_type in _SCALES):
                return True
            if node.op_type in _PASSES_ON and node not in seen:
                seen.add(node)
                stack.extend((output, looked_up or looks_up) for output in node.outputs)
    return False
