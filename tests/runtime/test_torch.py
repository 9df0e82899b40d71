"""PyTorch as a decoder: linearized layers, a real cache, and the numbers of one pass without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.linearize.swap import linearized
from nbl_export.runtime.torch import TorchDecoder
from tests.fixtures_graph import maps_in_place, plan_by_hand, ragged_rows
from tests.runtime.by_hand import teacher_forced


@pytest.mark.parametrize("layers", [(), (0,), (0, 1), (2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_masks_and_positions_stay_right_across_decode(
    stories_out: Path, stories_model: Any, layers: tuple[int, ...]
) -> None:
    """Against one pass over the whole row without a cache; the first layer is the one usually asked."""
    plan = plan_by_hand(stories_out, layers)
    lengths = (13, 8, 1)
    rows = ragged_rows([n + 5 for n in lengths], 500, seed=4)
    with linearized(stories_model, plan):
        decoder = TorchDecoder(stories_model, plan.chosen)
        assert decoder.kv_layers == tuple(i for i in range(5) if i not in layers)
        assert len(decoder.empty_past(3)) == 5 - len(layers)
        found = teacher_forced(decoder, rows, lengths)
    for row, logits in zip(rows, found, strict=True):
        with maps_in_place(stories_model, plan), torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            expected = stories_model(input_ids=ids, use_cache=False).logits[0].numpy()
        assert len(logits) == len(row)
        np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=5e-4)


def test_torch_cache_holds_what_transformers_caches(tiny_model: Any) -> None:
    row = ragged_rows([9], 260)[0].astype(np.int64)[None]
    decoder = TorchDecoder(tiny_model)
    ones = np.ones_like(row)
    present = decoder(row, ones, np.arange(9, dtype=np.int64)[None], decoder.empty_past(1)).present
    with torch.inference_mode():
        cache = tiny_model(input_ids=torch.from_numpy(row), use_cache=True).past_key_values
    assert len(present) == len(cache.layers) == 4
    for pair, layer in zip(present, cache.layers, strict=True):
        assert pair[0].shape == (1, 2, 9, 8)
        for found, expected in zip(pair, (layer.keys, layer.values), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
