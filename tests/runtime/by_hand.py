"""Decoding by hand: a ragged prefill, then one token at a time, with every mask and position written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.fixtures_graph import pad_left


def teacher_forced(decoder: Any, rows: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """For each row the logits of its tokens: a ragged prefill of ``lengths``, then one token at a time."""
    steps = len(rows[0]) - lengths[0]
    ids, mask, positions = pad_left([r[:n] for r, n in zip(rows, lengths, strict=True)])
    past = decoder.empty_past(len(rows))
    out = decoder(ids, mask, positions, past)
    seen = [[*out.logits[i, -n:]] for i, n in enumerate(lengths)]
    for step in range(steps):
        ids = np.array([[r[n + step]] for r, n in zip(rows, lengths, strict=True)], dtype=np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = np.array([[n + step] for n in lengths], dtype=np.int64)
        out = decoder(ids, mask, positions, out.present)
        assert all(t.shape[2] == mask.shape[1] for pair in out.present for t in pair)
        for i in range(len(rows)):
            seen[i].append(out.logits[i, 0])
    return seen
