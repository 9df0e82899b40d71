"""Array types by dtype; tokens that stand for the embeddings of images and sounds, beyond those of every vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
BOOL = NDArray[np.bool_]

FIRST = 1 << 30


def are_media(ids: Any) -> Any:
    """Which of ``ids``, an array or a tensor, stand for an embedding of an image or a sound."""
    return ids >= FIRST


def words(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """``rows`` with their tokens of text alone, one after the other, repeated as often as is needed; int32."""
    there = are_media(rows)
    return np.resize(rows[~there], rows.shape) if there.any() else rows
