"""Our own decode loop: what other projects' must give, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nbl_export.runtime.ort import OrtDecoder


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The ``count`` likeliest tokens after ``prompt``, one after the other, from the graph at ``path``."""
    decoder = OrtDecoder(path, rounded=False)  # as others run it
    past, ids = decoder.empty_past(1), np.array([prompt], dtype=np.int64)
    positions, tokens = np.arange(len(prompt))[None], []
    for _ in range(count):
        length = int(positions[0, -1]) + 1
        output = decoder(ids, np.ones((1, length), dtype=np.int64), positions, past)
        past = output.present
        tokens.append(int(output.logits[0, -1].argmax()))
        ids, positions = np.array([[tokens[-1]]], dtype=np.int64), np.array([[length]])
    return tokens
