"""Parity of an encoder: does every output of the graph equal PyTorch's with the same plan?

Both run one ragged batch, padded as the tokenizer does it, and one for each row that crosses a length of the model, or
one batch of images. Only real tokens are compared. The figures (:mod:`.vectors`) are of each output by itself: an
output of logits is held to the gates of logits, any other (states, pooled vectors) by its relative difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.rows import Inputs, Outputs, real_positions
from nbl_export.verify.parity.figures import Gates, OutputParity, OutputsParity
from nbl_export.verify.parity.vectors import compare_vectors


def compare_outputs(reference: Outputs, candidate: Outputs, inputs: Inputs, gates: Gates) -> OutputsParity:
    """Every output of the two on the batch ``inputs``; one that is missing differs without bound."""
    return compare_batches([reference], [candidate], [inputs], gates)


def compare_batches(
    reference: Sequence[Outputs], candidate: Sequence[Outputs], batches: Sequence[Inputs], gates: Gates
) -> OutputsParity:
    """The same over several ``batches``, of which the first has the rows that are said."""
    found = []
    for name in reference[0]:
        pairs = [_pair(name, *one) for one in zip(reference, candidate, batches, strict=True)]
        x, y = (np.concatenate(side) for side in zip(*pairs, strict=True))
        figures = compare_vectors(x, y, gates.near_tie)
        found.append(OutputParity(**vars(figures), output=name, width=x.shape[1]))
    inputs = batches[0]
    lengths = [int(n) for n in real_positions(inputs, 0).sum(axis=1) if n]
    return OutputsParity(len(next(iter(inputs.values()))), tuple(lengths), tuple(found), gates)


def _pair(
    name: str, reference: Outputs, candidate: Outputs, inputs: Inputs
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    a = reference[name]
    x, y = (vectors(v, inputs) for v in (a, candidate.get(name, np.full_like(a, np.nan))))
    return x, y if x.shape == y.shape else np.full_like(x, np.nan)


def vectors(output: NDArray[np.float32], inputs: Inputs) -> NDArray[np.float32]:
    """An output as [vectors, d]: of every real token, or of every row."""
    if output.ndim == 3:
        return output[real_positions(inputs, output.shape[1])]
    return output.reshape(len(output), -1)
