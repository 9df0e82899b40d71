"""A batch by input name, its rows, and which of its positions are not padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import MASK, POSITIONS, TOKEN_TYPES, TOKENS

# A batch by input name: integers [batch, sequence], or pixels [batch, channels, height, width].
Inputs = Mapping[str, NDArray[Any]]
# What an encoder makes of one, by output name.
Outputs = dict[str, NDArray[np.float32]]


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


def by_token(array: NDArray[Any], real: NDArray[np.bool_]) -> NDArray[Any] | None:
    """The tokens that are no padding of an ``array`` [batch, sequence, …] or [batch · sequence, …].

    ``real`` is [batch, sequence]. None for an array of other things than tokens.
    """
    if array.ndim > 2 and array.shape[:2] == real.shape:
        array = array.reshape(real.size, *array.shape[2:])
    if array.ndim < 2 or len(array) != real.size:
        return None
    tokens: NDArray[Any] = array[real.reshape(-1)]
    return tokens


def check_batch(inputs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless these are rows of ids with their mask, or images."""
    if TOKENS not in inputs:
        arrays = list(inputs.values())
        if any(
            a.ndim != 4 or a.dtype != np.float32 or not a.size or not np.isfinite(a).all() for a in arrays
        ):
            raise ValueError("the images of its batch")
        return
    shape = inputs[TOKENS].shape
    fits = len(shape) == 2 and all(a.shape == shape and a.dtype == np.int64 for a in inputs.values())
    mask = inputs.get(MASK)
    if not fits or not inputs[TOKENS].size or int(inputs[TOKENS].min()) < 0:
        raise ValueError("the tokens of its batch")
    if mask is not None and not (np.isin(mask, (0, 1)).all() and mask.any(axis=1).all()):
        raise ValueError("the mask of its batch")


def check_activations(inputs: Mapping[str, Any], arrays: Mapping[Any, Any]) -> None:
    """Raise ``ValueError`` unless ``arrays`` are [tokens, d] float32, one row for each token of the batch."""
    tokens = int(inputs[MASK].sum()) if MASK in inputs else inputs[TOKENS].size if TOKENS in inputs else None
    widths = {a.shape[1] if a.ndim == 2 and a.dtype == np.float32 else 0 for a in arrays.values()}
    rows = {a.shape[0] for a in arrays.values() if a.ndim}
    if 0 in widths or len(widths) > 1 or len(rows) > 1 or (tokens is not None and rows - {tokens}):
        raise ValueError("the shapes of its activations")


def check_routes(inputs: Mapping[str, Any], routes: Mapping[int, Any]) -> None:
    """Raise ``ValueError`` unless ``routes`` are places [tokens, …, k] int64, one row for each token of the batch."""
    tokens = int(inputs[MASK].sum()) if MASK in inputs else inputs[TOKENS].size if TOKENS in inputs else 0
    for taken in routes.values():
        if taken.dtype != np.int64 or taken.ndim < 2 or len(taken) != tokens or taken.min(initial=0) < 0:
            raise ValueError("the experts of its tokens")
