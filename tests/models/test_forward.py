"""Forward passes with an explicit cache, in pieces, against transformers' one pass over the whole row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from nbl_export.models.caches import PastLayer
from nbl_export.models.forward import run_uncached, run_with_past
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests.encoders import text_encoder
from tests.fixtures_graph import original_logits, pad_left, ragged_rows
from tests.tiny_types import tiny_model as random_model

LAYERS, KV_HEADS, SIZE, VOCAB = 4, 2, 8, 260


def empty(rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    nothing = torch.zeros(rows, KV_HEADS, 0, SIZE)
    return [(nothing, nothing)] * LAYERS


def step(model: Any, ids: Any, mask: Any, positions: Any, past: Any, keep: int = 0) -> Any:
    tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (ids, mask, positions))
    with torch.inference_mode():
        return run_with_past(model, *tensors, past, mask.shape[1] - ids.shape[1], keep)


@pytest.mark.parametrize("cuts", [(9,), (4, 5), (1, 1, 1, 6)], ids=str)
def test_a_row_in_pieces_is_the_row_in_one(tiny_model: Any, cuts: tuple[int, ...]) -> None:
    (row,) = ragged_rows([9], VOCAB)
    past, done, found = empty(1), 0, []
    for cut in cuts:
        ids = row[None, done : done + cut].astype(np.int64)
        done += cut
        positions = np.arange(done - cut, done)[None]
        logits, past = step(tiny_model, ids, np.ones((1, done), np.int64), positions, past)
        assert [t.shape for pair in past for t in pair] == [(1, KV_HEADS, done, SIZE)] * 2 * LAYERS
        found.append(logits[0].numpy())
    np.testing.assert_allclose(np.concatenate(found), original_logits(tiny_model, row), rtol=0, atol=2e-4)


def test_padding_on_the_left_is_hidden_by_the_mask(tiny_model: Any) -> None:
    rows = ragged_rows((7, 3), VOCAB, seed=1)
    logits, past = step(tiny_model, *pad_left(rows), empty(2))
    for i, row in enumerate(rows):
        found = logits[i, 7 - len(row) :].numpy()
        np.testing.assert_allclose(found, original_logits(tiny_model, row), rtol=0, atol=2e-4)
    # Other padding changes nothing of what is real.
    ids, mask, positions = pad_left(rows)
    other, _ = step(tiny_model, np.where(mask == 0, 99, ids), mask, positions, empty(2))
    np.testing.assert_allclose(other[1, 4:], logits[1, 4:], rtol=0, atol=2e-5)
    assert len(past) == LAYERS


def test_logits_of_the_last_positions_alone(tiny_model: Any) -> None:
    (row,) = ragged_rows([8], VOCAB, seed=2)
    inputs = row[None].astype(np.int64), np.ones((1, 8), np.int64), np.arange(8)[None]
    whole, _ = step(tiny_model, *inputs, empty(1))
    for keep in (1, 3):
        logits, past = step(tiny_model, *inputs, empty(1), keep)
        assert logits.shape == (1, keep, VOCAB)
        torch.testing.assert_close(logits, whole[:, -keep:], rtol=0, atol=1e-5)
        assert past[0][0].shape[2] == 8


def test_a_model_that_always_makes_all_logits_is_not_asked_for_fewer() -> None:
    model = random_model("gpt_neo")
    model.forward = without(model.forward, "logits_to_keep")
    ids = np.arange(1, 7)[None]
    nothing = torch.zeros(1, 4, 0, 8)
    logits, _ = step(model, ids, np.ones_like(ids), ids - 1, [(nothing, nothing)] * 4, keep=1)
    assert logits.shape[1] == 6


def without(forward: Any, argument: str) -> Any:
    """``forward`` of a release of transformers that had no such argument."""
    import inspect

    def older(*args: Any, **kwargs: Any) -> Any:
        assert argument not in kwargs
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    older.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name != argument]
    )
    return older


def test_a_layer_of_the_cache_says_the_length_it_was_told() -> None:
    """A linearized layer keeps no keys, and may be the one that is asked how long the past is."""
    layer = PastLayer(5, torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 0, 1))
    assert layer.get_seq_length() == layer.get_seq_length(3) == 5
    assert layer.get_mask_sizes(2) == (7, 0)
    assert layer.get_mask_sizes(torch.arange(2)) == (7, 0)  # as transformers 4 asks


def test_a_linear_layers_entry_stays_as_it_was(tiny_model: Any) -> None:
    """Layer 0 writes no keys; the others still know how long the past is."""
    (row,) = ragged_rows([6], VOCAB, seed=3)
    attention = tiny_model.model.layers[0].self_attn
    nothing = torch.zeros(1, 1, 0, 1)
    hook = attention.register_forward_hook(lambda _m, _a, out: (torch.zeros_like(out[0]), *out[1:]))
    plain = attention.forward
    try:
        expected = original_logits(tiny_model, row)
        attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
        past = [(nothing, nothing), *empty(1)[1:]]
        found = []
        for at, token in enumerate(row):
            ids = np.array([[token]], np.int64)
            logits, past = step(tiny_model, ids, np.ones((1, at + 1), np.int64), np.array([[at]]), past)
            assert past[0][0].shape == (1, 1, 0, 1) and past[1][0].shape[2] == at + 1
            found.append(logits[0].numpy())
    finally:
        del attention.forward
        hook.remove()
    assert attention.forward.__func__ is plain.__func__
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=2e-4)


# in one pass -------------------------------------------------------------------------------------


def test_a_batch_in_one_pass_leaves_out_what_the_model_does_not_take(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    model = load_model(find_model(str(folder)))
    ids = np.array([[257, 20, 30, 258], [257, 40, 258, 256]])
    mask = (ids != 256).astype(np.int64)
    types = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    found = run_uncached(model, {**inputs, "pixel_values": np.zeros((2, 3, 4, 4), np.float32)})
    with torch.inference_mode():
        theirs = AutoModel.from_pretrained(folder)(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    torch.testing.assert_close(found.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-5)


class Patches(torch.nn.Module):
    """Takes images in its own precision alone, as a convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Conv2d(3, 4, 2, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.project(pixel_values)


def test_pixels_are_rounded_to_the_models_precision() -> None:
    torch.manual_seed(0)
    model = Patches().to(torch.bfloat16)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    found = run_uncached(model, {"pixel_values": pixels})
    rounded = torch.from_numpy(pixels).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(found, model(rounded)) and found.dtype == torch.bfloat16
    # Ids are whole numbers and stay so.
    ids = np.array([[300, 7]])
    embedding = torch.nn.Embedding(301, 2).to(torch.bfloat16)
    embedding.forward = lambda input_ids: torch.nn.functional.embedding(input_ids, embedding.weight)  # type: ignore[method-assign]
    assert torch.equal(run_uncached(embedding, {"input_ids": ids})[0, 0], embedding.weight[300])
