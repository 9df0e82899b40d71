"""Name what a graph is given, and make it of ragged rows: batches, their padding, and tokens of images and sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
BOOL = NDArray[np.bool_]

# Inputs of a graph.
TOKENS, EMBEDDINGS, MASK, POSITIONS = "input_ids", "inputs_embeds", "attention_mask", "position_ids"
TOKEN_TYPES, PIXELS = "token_type_ids", "pixel_values"
# Embeddings of each layer, beside inputs_embeds, as onnxruntime-genai calls them.
PER_LAYER = "per_layer_inputs"
WRITE_INDICES = "write_indices"  # the input that only a static cache has
# For how many last positions logits are computed, and the value that means all of them.
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
ALL_LOGITS = 0
# Symbolic dimensions of a decoder graph. MAX is the length of a static cache.
BATCH, SEQUENCE, PAST, TOTAL, MAX = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "max_sequence_length",
)
SIDES = ("key", "value")  # of a KV pair

# Tokens from here on, beyond those of every vocabulary, stand for the embeddings of images and sounds.
FIRST = 1 << 30


def are_media(ids: Any) -> Any:
    """Which of ``ids``, an array or a tensor, stand for an embedding of an image or a sound."""
    return ids >= FIRST


def words(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """``rows`` with their tokens of text alone, one after the other, repeated as often as is needed; int32."""
    there = are_media(rows)
    return np.resize(rows[~there], rows.shape) if there.any() else rows


def hidden_in(
    prose: Sequence[int], sentences: Sequence[Sequence[int]], random: Random
) -> tuple[list[int], list[int]]:
    """``prose`` with ``sentences``, each anywhere in an equal part of it, and where in the prose each one stands."""
    places = [int((part + random.random()) / len(sentences) * len(prose)) for part in range(len(sentences))]
    row = list(prose[: places[0]])
    for sentence, (at, end) in zip(sentences, pairwise([*places, len(prose)]), strict=True):
        row += [*sentence, *prose[at:end]]
    return row, places


# rows ----------------------------------------------------------------------------------------------


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


def left_padded(rows: Sequence[NDArray[Any]], pad: int = 0) -> tuple[I64, I64, I64]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of ragged ``rows``, padded on the left."""
    batch = batch_of_rows([{TOKENS: np.asarray(row)[None]} for row in rows], pad, left=True)
    return batch[TOKENS], batch[MASK], np.maximum(batch[MASK].cumsum(axis=1) - 1, 0)


def one_more(tokens: Sequence[int], mask: I64, positions: I64) -> tuple[I64, I64, I64]:
    """``input_ids`` [rows, 1], ``attention_mask`` and ``position_ids`` of each row's next token."""
    ids = np.array(tokens, dtype=np.int64)[:, None]
    return ids, np.concatenate([mask, np.ones_like(ids)], axis=1), positions[:, -1:] + 1


def right_padded(rows: Sequence[NDArray[Any]], pad: int = 0) -> tuple[I64, I64]:
    """``input_ids`` and ``position_ids`` [batch, longest] of ragged ``rows``, padded on the right."""
    ids = batch_of_rows([{TOKENS: np.asarray(row)[None]} for row in rows], pad)[TOKENS]
    return ids, np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(rows), 1))


def prefix_padded(rows: Sequence[NDArray[Any]], pad: int = 0) -> tuple[I64, I64, I64]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of ragged ``rows``, padded on the right."""
    ids, positions = right_padded(rows, pad)
    return ids, prefix_mask([len(row) for row in rows], ids.shape[1]).astype(np.int64), positions


def prefix_mask(lengths: Sequence[int] | I64, width: int) -> BOOL:
    """[rows, width]: True for the first ``lengths[i]`` positions of row i."""
    mask: BOOL = np.arange(width)[None] < np.asarray(lengths)[:, None]
    return mask
