"""The next token of logits: the likeliest, or one drawn by temperature and top-p with a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import InputError


class Sampler:
    """Chooses tokens. Two with the same arguments choose the same tokens for the same logits.

    ``temperature`` divides the logits; 0 takes the likeliest token, the first of several. ``top_p`` leaves the fewest
    likeliest tokens that together have this probability, one at least, as transformers does.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[Any]) -> int:
        """A token for ``logits`` [vocab]; raises :class:`InputError` if they are no numbers."""
        values = np.asarray(logits, dtype=np.float64)
        best = int(values.argmax())
        if not np.isfinite(values[best]):
            raise InputError(
                "The graph's logits are not finite, so there is no next token: see what `nbl-export verify` says of it."
            )
        if self._temperature == 0:
            return best
        with np.errstate(over="ignore"):  # at a temperature near 0 all others are infinitely far
            weights = np.exp((values - values[best]) / self._temperature)
        order = np.argsort(-weights, kind="stable")
        summed = np.cumsum(weights[order])
        kept = int(np.searchsorted(summed, self._top_p * summed[-1])) + 1
        place = int(np.searchsorted(summed[:kept], self._random.random() * summed[kept - 1], side="right"))
        return int(order[min(place, kept - 1)])
