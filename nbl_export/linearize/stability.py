"""Say how often greedy search would choose each layer on other documents, by what it has measured already.

Documents are drawn with replacement (bootstrap), and the search is followed again with the losses over those. What a
layer adds to a set that was not measured is taken from the largest set of the path with which it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nbl_export.batch import F64
from nbl_export.blocks import Block
from nbl_export.linearize.search import MeasuredSets, Saved
from nbl_export.linearize.selection import Sums, cost_of

_SAMPLES = 200


def stability(
    sets: MeasuredSets, path: Sequence[Sequence[Block]], blocks: Sequence[Block], saved: Saved, seed: int
) -> dict[Block, float]:
    """The share of resampled documents by which each of ``blocks`` is among as many as the last set of ``path`` has.

    ``path`` are the sets that were chosen one after the other, each with one block more. Empty where the text has one
    document, or where nothing was chosen.
    """
    documents = sorted({name for block in blocks for found in sets.known([block]) for name in found.text})
    if len(documents) < 2 or not path:
        return {}
    drawn: F64 = (
        np.random.default_rng(seed)
        .multinomial(len(documents), np.full(len(documents), 1 / len(documents)), size=_SAMPLES)
        .astype(np.float64)
    )
    rates = np.full((_SAMPLES, len(blocks)), np.inf)
    chosen = np.zeros((_SAMPLES, len(blocks)), dtype=bool)
    for before in [(), *path[:-1]]:
        base = sets.known(before) if before else []
        for column, block in enumerate(blocks):
            found = sets.known([*before, block]) if block not in before else []
            if found and (base or not before) and (saves := saved([block])) > 0:
                same = sum(base[: len(found)], Sums())
                rates[:, column] = _added(sum(found, Sums()), same, documents, drawn) / saves
        best = np.where(chosen, np.inf, rates).argmin(axis=1)
        chosen[np.arange(_SAMPLES), best] = True
    return dict(zip(blocks, chosen.mean(axis=0).tolist(), strict=True))


def _added(found: Sums, base: Sums, documents: Sequence[str], drawn: F64) -> F64:
    """What ``found`` costs more than ``base`` by each sample ``drawn`` [samples, documents] of the ``documents``."""
    tokens, more = np.zeros(len(documents)), np.zeros(len(documents))
    for at, name in enumerate(documents):
        if name in found.text:
            tokens[at], kl, _ = found.text[name]
            more[at] = kl - base.text.get(name, (0.0, 0.0))[1]
    before = base.synthetic
    synthetic = {
        kind: (kl - before.get(kind, (0.0, 0.0))[1]) / n for kind, (n, kl, _) in found.synthetic.items()
    }
    count = drawn @ tokens
    mean = more.sum() / tokens.sum()  # where none of its documents is drawn
    return cost_of(np.where(count > 0, drawn @ more / np.maximum(count, 1), mean), synthetic)


# A layer that fewer, or more, of the samples choose is decided on.
_OPEN = 0.1


def undecided(stable: Mapping[Block, float]) -> str:
    """A sentence on the layers that documents are divided on; empty where there are none."""
    named = [f"{block} ({share:.0%})" for block, share in stable.items() if _OPEN <= share <= 1 - _OPEN]
    if not named:
        return ""
    return f"Equal within the noise of the text: layers {', '.join(named)}, chosen by so many of resampled documents."
