"""Ragged rows of tokens as one rectangular batch, padded on the left or on the right.

A cache that grows by concatenation needs rows that end together, so padding goes on the left and a mask
hides it. A static cache is written at one index per row, so padding goes on the right, where the next
token overwrites it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, I64


def left_padded(rows: Sequence[NDArray[Any]], pad: int = 0) -> tuple[I64, I64, I64]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of ragged ``rows``, padded on the left."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return ids, mask, positions


def one_more(tokens: Sequence[int], mask: I64, positions: I64) -> tuple[I64, I64, I64]:
    """``input_ids`` [rows, 1], ``attention_mask`` and ``position_ids`` of each row's next token."""
    ids = np.array(tokens, dtype=np.int64)[:, None]
    return ids, np.concatenate([mask, np.ones_like(ids)], axis=1), positions[:, -1:] + 1


def right_padded(rows: Sequence[NDArray[Any]], pad: int = 0) -> tuple[I64, I64]:
    """``input_ids`` and ``position_ids`` [batch, longest] of ragged ``rows``, padded on the right."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))


def prefix_padded(rows: Sequence[NDArray[Any]], pad: int = 0) -> tuple[I64, I64, I64]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of ragged ``rows``, padded on the right."""
    ids, positions = right_padded(rows, pad)
    return ids, prefix_mask([len(row) for row in rows], ids.shape[1]).astype(np.int64), positions


def prefix_mask(lengths: Sequence[int] | I64, width: int) -> BOOL:
    """[rows, width]: True for the first ``lengths[i]`` positions of row i."""
    mask: BOOL = np.arange(width)[None] < np.asarray(lengths)[:, None]
    return mask
