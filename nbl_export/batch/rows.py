"""A batch by input name, its rows, and which of its positions are not padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import MASK, POSITIONS, TOKEN_TYPES, TOKENS

# A batch by input name: integers [batch, sequence], or pixels [batch, channels, height, width].
Inputs = Mapping[str, NDArray[Any]]


def rows_of_batch(inputs: Inputs) -> list[dict[str, NDArray[Any]]]:
    """The rows of a batch, each as a batch of one without padding: ids (and token types), or an image."""
    mask = inputs.get(MASK)
    rows = []
    for i in range(len(next(iter(inputs.values())))):
        real = slice(None) if mask is None else mask[i].astype(bool)
        # The mask and the positions can be derived from the rest.
        given = {n: a[i : i + 1] for n, a in inputs.items() if n not in (MASK, POSITIONS)}
        rows.append({n: a[:, real] if n in (TOKENS, TOKEN_TYPES) else a for n, a in given.items()})
    return rows


def batch_of_rows(rows: Sequence[Inputs], pad: int = 0, left: bool = False) -> dict[str, NDArray[Any]]:
    """One batch of rows as :func:`rows_of_batch` gives them: padded with the token ``pad``, with a mask."""
    first = rows[0]
    if TOKENS not in first:
        return {name: np.concatenate([row[name] for row in rows]) for name in first}
    lengths = np.array([row[TOKENS].shape[1] for row in rows])
    positions = np.arange(lengths.max())[None]
    mask = positions >= (lengths.max() - lengths)[:, None] if left else positions < lengths[:, None]
    batch = {}
    for name in first:
        batch[name] = np.full(mask.shape, pad if name == TOKENS else 0, dtype=np.int64)
        batch[name][mask] = np.concatenate([row[name][0] for row in rows])
    return {**batch, MASK: mask.astype(np.int64)}


def real_positions(inputs: Inputs, length: int) -> NDArray[np.bool_]:
    """[batch, length]: which positions seen by attention are not padding."""
    if MASK in inputs:
        return inputs[MASK].astype(bool)
    return np.ones((len(next(iter(inputs.values()))), length), dtype=bool)
