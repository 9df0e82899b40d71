"""Choices of the k largest scores: how far those of another computation fall short, and how far scores have moved."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32


def shortfall(scores: NDArray[Any], taken: NDArray[Any]) -> F32:
    """[tokens]: by how much the lowest score ``taken`` is below the lowest of the best, as many as are taken.

    ``scores`` are [tokens, …, n], ``taken`` [tokens, …, k] places in them. 0 for the best themselves.
    """
    places = taken.shape[-1]
    best = np.partition(scores, -places, axis=-1)[..., -places]
    lowest = np.take_along_axis(scores, taken, axis=-1).min(axis=-1)
    with np.errstate(invalid="ignore"):
        short = np.where(lowest >= best, 0.0, best - lowest)  # two scores of minus infinity are equal
    found: F32 = short.reshape(len(short), -1).max(axis=-1).astype(np.float32)
    return found


def moved(before: NDArray[Any], after: NDArray[Any]) -> float:
    """The largest difference of two scores, of those that are finite in both: others are ruled out, not weighed."""
    known = np.isfinite(before) & np.isfinite(after)
    # A group that is ruled out in one of them alone has other scores by its choice, which is judged for itself.
    return float(np.abs(np.where(known, after, 0) - np.where(known, before, 0)).max(initial=0.0))


def differing(one: NDArray[Any], other: NDArray[Any]) -> int:
    """The tokens for which two choices, each [tokens, …, k], are not the same places in any order."""
    unlike = np.sort(one, axis=-1) != np.sort(other, axis=-1)
    return int(unlike.reshape(len(unlike), -1).any(axis=-1).sum())
