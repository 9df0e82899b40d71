"""The scale of rounding: small, positive, and without a trace in the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.verify.parity.noise import rounding_noise
from tests.fixtures_graph import ragged_rows

ROWS = ragged_rows((20, 13, 5), 500)


def test_noise_is_small_and_positive(stories_model: Any) -> None:
    noise = rounding_noise(stories_model, ROWS)
    assert 1e-7 < noise < 1e-3
    assert rounding_noise(stories_model, ROWS) == noise
    assert rounding_noise(stories_model, ROWS, seed=1) != noise


def test_noise_is_of_the_embeddings_last_bit(stories_model: Any) -> None:
    """A last bit a thousand times larger moves the logits about a thousand times as much."""
    ids = torch.from_numpy(ROWS[0].astype(np.int64))[None]
    table = stories_model.get_input_embeddings().weight[ids]
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, table.shape, generator=generator) * 2 - 1
    with torch.inference_mode():
        exact = stories_model(inputs_embeds=table, use_cache=False).logits
        moved = stories_model(inputs_embeds=table * (1 + signs * 2.0**-13), use_cache=False).logits
    expected = float((moved - exact).abs().max()) / 2**10
    # Rounding within the model adds its own, so only the order of magnitude is asked.
    assert expected / 10 < rounding_noise(stories_model, ROWS[:1]) < expected * 10


def test_the_model_is_left_as_it_was(stories_model: Any) -> None:
    embeddings = stories_model.get_input_embeddings()
    ids = torch.from_numpy(ROWS[0].astype(np.int64))[None]
    with torch.inference_mode():
        before = stories_model(input_ids=ids, use_cache=False).logits
        rounding_noise(stories_model, ROWS)
        after = stories_model(input_ids=ids, use_cache=False).logits
    assert torch.equal(before, after)
    assert len(embeddings._forward_hooks) == 0


def test_the_hook_goes_when_the_model_fails(stories_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = stories_model.get_input_embeddings()
    calls = []

    def forward(**_inputs: Any) -> Any:
        calls.append(len(embeddings._forward_hooks))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return type("Output", (), {"logits": torch.zeros(3, 20, 4)})()

    monkeypatch.setattr(stories_model, "forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        rounding_noise(stories_model, ROWS)
    assert calls == [0, 1]
    assert len(embeddings._forward_hooks) == 0
