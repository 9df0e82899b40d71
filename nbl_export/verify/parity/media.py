"""Parity on texts with images and sounds: a graph that reads embeddings is given theirs among those of its tokens.

PyTorch and the graph run the same rows of held-out text, each by itself, up to a while after their first one. The
graph attends to earlier tokens only; so does PyTorch here, also where a model lets the tokens of an image see each
other in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32, FIRST, are_media
from nbl_export.batch.names import EMBEDDINGS, POSITIONS
from nbl_export.linearize.swap import ORIGINAL, linearized, sweep, version_of
from nbl_export.models.media_tokens import MediaTokens, seeing
from nbl_export.models.weights import device_of, streams
from nbl_export.progress import Listener
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.verify.parity.decoder import LAST
from nbl_export.verify.parity.figures import Gates, Parity, StepParity
from nbl_export.verify.parity.vectors import compare_vectors

if TYPE_CHECKING:
    import torch

    from nbl_export.linearize.plan import Plan

I32 = NDArray[np.int32]
_ROWS, _AFTER = 2, 32  # rows that are compared, and how many tokens after the first image of each


def rows_with_media(heldout: I32) -> list[I32]:
    """The first rows of ``heldout`` that have images or sounds, each up to a while after its first one."""
    found = []
    for row in heldout:
        there = np.flatnonzero(are_media(row))
        if len(there):
            after = there[0] + int(np.argmin(np.append(are_media(row[there[0] :]), False)))
            found.append(row[: after + _AFTER])
    return found[:_ROWS]


def media_parity(
    model: torch.nn.Module,
    plan: Plan | None,
    graph: Path,
    rows: Sequence[I32],
    media: MediaTokens,
    gates: Gates,
    listener: Listener | None = None,
) -> Parity:
    """The last logits of each of ``rows`` by the ``graph`` against ``model`` with ``plan``, a step each."""
    import torch

    causal = replace(media, both_ways=np.zeros(1, np.int32))
    ids = [torch.from_numpy(row.astype(np.int64)).to(device_of(model)) for row in rows]
    with seeing(model, causal):
        expected = [
            logits[-LAST:].float().cpu().numpy() for logits in _by_pytorch(model, plan, ids, listener)
        ]
    decoder = OrtDecoder(graph, small=True)
    steps = []
    for number, (row, reference) in enumerate(zip(rows, expected, strict=True)):
        found = _by_graph(decoder, row, causal)
        steps.append(StepParity(**vars(compare_vectors(reference, found, gates.near_tie)), step=number))
    return Parity(tuple(map(len, rows)), tuple(steps), gates)


def _by_pytorch(
    model: torch.nn.Module, plan: Plan | None, rows: Sequence[torch.Tensor], listener: Listener | None
) -> Iterator[torch.Tensor]:
    import torch

    if streams(model):
        version = version_of(model, plan) if plan else ORIGINAL
        fit_input = plan.fit_input if plan else "normed"
        for _, _, logits in sweep(model, rows, [version], fit_input, listener=listener):
            yield logits
        return
    with torch.inference_mode(), linearized(model, plan) if plan else nullcontext():
        for row in rows:
            yield model(input_ids=row[None], use_cache=False).logits[0]


def _by_graph(decoder: OrtDecoder, row: I32, media: MediaTokens) -> F32:
    import torch

    ids = row.astype(np.int64)[None]
    there = are_media(ids)
    assert decoder.interface.embedding is not None
    index = np.where(there, ids - FIRST, 0)
    # The embeddings of each layer are those of other tokens.
    given = dict(decoder.interface.embedding(np.where(there, media.stand_in[index], ids)))
    given[EMBEDDINGS] = decoder.interface.embedding(np.where(there, 0, ids))[EMBEDDINGS]
    given[EMBEDDINGS][there] = media.features[index[there]]
    positions = media.positions(torch.from_numpy(ids)).numpy()
    inputs = {**given, POSITIONS: positions if len(positions) > 1 else positions[0]}
    logits: F32 = decoder.run(decoder.interface.row(inputs, decoder.cache_dtype)).logits
    return logits[0, -LAST:]
